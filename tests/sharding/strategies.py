"""The ways of sharding, and one training run that a sharded model and its unsharded twin both go through."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hf_tam
from hf_tam.sharding import Reduced

STEPS = 20


class Model(nn.Module):
    """Dimensions that no world size divides, parameters smaller than the world, one that is used now and then."""

    def __init__(self, lora):
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(5, 12)
        self.middle = nn.Linear(12, 12)
        self.down = nn.Linear(12, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.sometimes = nn.Parameter(torch.full((3, 7), 0.3))
        self.never = nn.Parameter(torch.ones(2, 2))
        self.adapter = nn.ParameterList([nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.zeros(12, 2))])
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("adapter"))

    def forward(self, inputs, step):
        hidden = torch.relu(self.up(inputs))
        hidden = self.middle(hidden) + inputs @ self.adapter[0].T @ self.adapter[1].T
        outputs = self.down(torch.tanh(hidden)) * self.gain
        return outputs + inputs[:, :3] * self.sometimes.sum() if step % 3 == 1 else outputs


@dataclass
class Sharding:
    """One way of sharding a model.

    Attributes:
        world: Number of processes.
        shard: Takes the model, returns what is trained.
        groups: How many all-reduces a step takes.
        flat: Whether a missing gradient becomes zeros (a flat buffer).
        lora: Whether all but two small adapters is frozen.
        clip: Whether gradients are clipped; torch's clipping cannot span tensor-parallel and plain parameters.
        kinds: The types that the trained parameters must have.
    """

    name: str
    world: int
    shard: object
    groups: int = 1
    flat: bool = False
    lora: bool = False
    clip: bool = True
    kinds: tuple = field(default=(DTensor,))


def ddp(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp1(strategy):
    def shard(model):
        return FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=strategy
        )

    return shard


def fsdp2(*, reshard=True, shape=None, offload=False):
    def shard(model):
        size = torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", shape or (size,), mesh_dim_names=("replicate", "shard")[-len(shape or (1,)) :])
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
        fully_shard(model.middle, mesh=mesh, reshard_after_forward=reshard, **options)
        return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)

    return shard


PLAN = {"up": ColwiseParallel(), "middle": RowwiseParallel()}


def tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), PLAN)


def run(optimizer_name, sharding, options, *, cut):
    """Train a sharded model beside its unsharded twin; what each of them ended with.

    Args:
        optimizer_name: A class of hf_tam.
        sharding: A `Sharding`.
        options: Arguments of the optimizer.
        cut: Whether the reduction is left out, as a naive optimizer would.
    """
    twin, model = Model(sharding.lora), Model(sharding.lora)
    sharded = sharding.shard(model)
    optimizers = []
    for module in (twin, sharded):
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = getattr(hf_tam, optimizer_name)(trainable, lr=0.02, **options)
        optimizer.attach(module)
        optimizers.append(optimizer)
    kinds = {type(parameter) for parameter in optimizers[1].param_groups[0]["params"]}
    calls = []
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        batches = torch.randn(2, 6, 5, generator=generator)
        _train(twin, optimizers[0], batches, step, flat=sharding.flat, clip=sharding.clip)
        with _counted(calls if step else None, cut=cut):
            _train(sharded, optimizers[1], batches, step, flat=False, clip=sharding.clip)
    stats = [optimizer.torque_stats() for optimizer in optimizers]
    return {
        "kinds": [kind.__name__ for kind in kinds],
        "reduces": len(calls) / (STEPS - 1),
        "bytes": max(calls, default=0),
        "tensors": len(stats[0]["torque"]),
        "torque": (stats[1]["torque"] - stats[0]["torque"]).abs().max().item(),
        "damping": stats[0]["damping"].tolist(),
        "grad_norm": (stats[1]["grad_norm"] - stats[0]["grad_norm"]).abs().item(),
        "parameters": _distance(sharded, twin),
    }


def _train(module, optimizer, batches, step, *, flat, clip):
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * (1 - step / STEPS)
    optimizer.zero_grad()
    for batch in batches:  # gradient accumulation
        loss = (module(batch, step) - batch[:, :3].sin()).square().mean() / len(batches)
        loss.backward()
    for parameter in module.parameters():
        if flat and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if clip and isinstance(module, FullyShardedDataParallel):
        module.clip_grad_norm_(0.5)
    elif clip:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    optimizer.step()


@contextlib.contextmanager
def _counted(calls, *, cut):
    """Note the bytes of each all-reduce that the optimizer itself asks for; leave the reduction out if `cut`."""
    from hf_tam.sharding import groups

    original = groups._all_reduce
    reduce = groups.ShardGroups.reduce

    def counting(tensor, group):
        if calls is not None:
            calls.append(tensor.numel() * tensor.element_size())
        return original(tensor, group)

    def naive(self, sums, rows, *, present):
        return Reduced(sums)

    groups._all_reduce = counting
    if cut:
        groups.ShardGroups.reduce = naive
    try:
        yield
    finally:
        groups._all_reduce = original
        groups.ShardGroups.reduce = reduce


def _distance(sharded, twin):
    """The largest difference of any parameter, relative to its largest value."""
    if isinstance(sharded, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(sharded, writeback=False):
            return _largest(dict(sharded.module.named_parameters()), dict(twin.named_parameters()))
    whole = {
        name.removeprefix("module."): parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in sharded.named_parameters()
    }
    return _largest(whole, dict(twin.named_parameters()))


def _largest(actual, expected):
    return max(
        ((actual[name].reshape(-1) - value.reshape(-1)).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    )


def fsdp2_on_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    return fully_shard(model, mesh=mesh["shard"])


SHARDINGS = [
    *(Sharding(f"ddp-{size}", size, ddp, groups=0, kinds=(nn.Parameter,)) for size in (2, 4)),
    *(
        Sharding(f"fsdp1-{strategy.name.lower()}-{size}", size, fsdp1(strategy), flat=True, kinds=(nn.Parameter,))
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
        for size in (2, 4)
    ),
    *(
        Sharding(f"fsdp2-reshard-{reshard}-{size}", size, fsdp2(reshard=reshard))
        for reshard in (True, False)
        for size in (2, 3, 4)
    ),
    Sharding("fsdp2-lora-4", 4, fsdp2(), lora=True),
    Sharding("fsdp2-offload-2", 2, fsdp2(offload=True)),
    Sharding("hsdp-4", 4, fsdp2(shape=(2, 2))),
    Sharding("fsdp2-tp-4", 4, fsdp2_on_tensor_parallel, groups=2, clip=False),
    *(Sharding(f"tp-{size}", size, tensor_parallel, clip=False, kinds=(DTensor, nn.Parameter)) for size in (2, 4)),
]
