"""The ways of sharding, each with what must be true of it."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.sharding import zero_engine
from tests.sharding.trained import Trained, make_optimizer


@dataclass
class Sharding:
    """One way of sharding a model.

    Attributes:
        world: Number of processes.
        start: Takes the model, the name of an optimizer and its options, returns a `Trained`.
        groups: How many all-reduces a step takes, or a function of the `Trained` that tells.
        axes: Over how many of them a tensor may be summed.
        flat: Whether a missing gradient becomes zeros (a flat buffer).
        clip: Whether gradients are clipped; torch's clipping cannot span tensor-parallel and plain parameters.
        num_groups: Param groups of the optimizer.
        dtype: What forward and backward are computed in.
        stored: What the optimizer's parameters and moments are kept in.
        steady: Whether every parameter that is used at all is used in every step.
        scopes: The scopes that are possible.
        kinds: The types of what the optimizer steps.
    """

    name: str
    world: int
    start: object
    groups: object = 1
    axes: int = 1
    flat: bool = False
    clip: bool = True
    num_groups: int = 1
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    steady: bool = False
    scopes: tuple = ("tensor", "model")
    kinds: tuple = field(default=("DTensor",))

    @property
    def is_zero(self):
        return self.name.startswith("zero")


def wrapped(shard, *, clip=True, dtype=torch.float32):
    """How to start with one of torch's wrappers, after which the optimizer is built."""

    def start(model, name, options, num_groups):
        sharded = shard(model)
        optimizer = make_optimizer(name, sharded, options, num_groups=num_groups)
        return Trained(sharded, optimizer, clip=clip, dtype=dtype)

    return start


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(strategy, *, mixed=False):
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None

    def shard(model):
        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=strategy,
            mixed_precision=precision,
        )

    return shard


def fsdp2(*, reshard=True, shape=None, offload=False, mixed=False, stored=torch.float32):
    def shard(model):
        model = model.to(stored)
        size = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", shape or (size,), mesh_dim_names=("replicate", "shard")[-len(shape or (1,)) :])
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
        if mixed:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model.middle, mesh=mesh, reshard_after_forward=reshard, **options)
        return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)

    return shard


def fsdp1_on_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), device_mesh=mesh["shard"]
    )


PLAN = {"up": ColwiseParallel(), "middle": RowwiseParallel()}


def tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), PLAN)


def fsdp2_on_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    return fully_shard(model, mesh=mesh["shard"])


def of_wrapper(name, world, shard, **more):
    return Sharding(
        name, world, wrapped(shard, clip=more.get("clip", True), dtype=more.get("dtype", torch.float32)), **more
    )


WRAPPERS = [
    *(of_wrapper(f"ddp-{size}", size, ddp, groups=0, kinds=("Parameter",)) for size in (2, 4)),
    *(
        of_wrapper(f"fsdp1-{strategy.name.lower()}-{size}", size, fsdp1(strategy), flat=True, kinds=("Parameter",))
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
        for size in (2, 4)
    ),
    *(
        of_wrapper(f"fsdp2-reshard-{reshard}-{size}", size, fsdp2(reshard=reshard))
        for reshard in (True, False)
        for size in (2, 3, 4)
    ),
    of_wrapper("fsdp2-offload-2", 2, fsdp2(offload=True)),
    of_wrapper("fsdp2-mixed-2", 2, fsdp2(mixed=True), dtype=torch.bfloat16),
    of_wrapper("fsdp2-bf16-2", 2, fsdp2(stored=torch.bfloat16), dtype=torch.bfloat16, stored=torch.bfloat16),
    of_wrapper(
        "fsdp1-mixed-2",
        2,
        fsdp1(ShardingStrategy.FULL_SHARD, mixed=True),
        flat=True,
        dtype=torch.bfloat16,
        kinds=("Parameter",),
    ),
    of_wrapper("hsdp-4", 4, fsdp2(shape=(2, 2))),
    of_wrapper("fsdp2-tp-4", 4, fsdp2_on_tensor_parallel, groups=2, axes=2, clip=False),
    of_wrapper(
        "fsdp1-tp-4", 4, fsdp1_on_tensor_parallel, groups=2, axes=2, clip=False, flat=True, kinds=("Parameter",)
    ),
    *(of_wrapper(f"tp-{size}", size, tensor_parallel, clip=False, kinds=("DTensor", "Parameter")) for size in (2, 4)),
]


def of_zero(stage, world, *, dtype=torch.float32, num_groups=1, label="", steady=False, **config):
    name = "-".join(filter(None, [f"zero{stage}", label, "bf16" if dtype == torch.bfloat16 else "", str(world)]))
    one_call = num_groups == 1 and "sub_group_size" not in config
    return Sharding(
        name,
        world,
        zero_engine.starting(stage, dtype=dtype, **config),
        groups=zero_engine.num_calls,
        flat=True,
        num_groups=num_groups,
        dtype=dtype,
        # Seen in deepspeed 0.19: ZeRO-3 and offloading go on with the last gradient of what has none in this step.
        steady=steady or stage == 3,
        scopes=("tensor", "model") if one_call else ("tensor",),
        kinds=("Tensor",),
    )


ZERO = [
    *(of_zero(stage, world, dtype=dtype) for stage in (1, 2, 3) for world in (2, 4) for dtype in zero_engine.DTYPES),
    *(of_zero(stage, world, num_groups=2, label="groups") for stage in (1, 2, 3) for world in (2, 4)),
    *(of_zero(3, world, sub_group_size=20, label="subgroups") for world in (2, 4)),
    *(
        of_zero(stage, 2, label="offload", steady=True, offload_optimizer={"device": "cpu"})
        for stage in (1, 2, 3)
    ),
    of_zero(1, 2, dtype=torch.bfloat16, label="fp32-sums", grad_accum_dtype="fp32"),
]  # fmt: skip

SHARDINGS = {sharding.name: sharding for sharding in WRAPPERS + ZERO}
