"""Trains sharded models, saves them in torch's formats, and lays what a resumed run holds beside what was saved.

Everything is compared as whole tensors that are put together here, from what each rank holds, and not by the library
that wrote the checkpoint.
"""

import contextlib
import functools
import os
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
)
from torch.distributed.tensor import DTensor

import hf_tam
from tests.sharding import strategies
from tests.sharding.trained import Model

SAVED_AT = 12
"""Steps before a checkpoint: more than 10, so that every torque has left 0."""
STOPPED_AT = 16
"""The last step of a run that goes on."""
THEIRS = {
    "AdamW": torch.optim.AdamW,
    "AMSGrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}


SHARDINGS = {
    "single": lambda model: model,
    "ddp": strategies.ddp,
    "fsdp1": strategies.fsdp1(ShardingStrategy.FULL_SHARD),
    "fsdp2": strategies.fsdp2(),
    "fsdp2-offload": strategies.fsdp2(offload=True),
    "hsdp": strategies.fsdp2(shape=(2, 2)),
    "tp": strategies.tensor_parallel,
    "fsdp2-tp": strategies.fsdp2_on_tensor_parallel,
}
"""The ways of sharding over all ranks of a world; "single" is not sharded."""


def shard(name, *, lora=False, dtype=torch.float32, unused=True):
    """A model that is sharded as `name` says; without `unused` no parameter is left that never gets a gradient."""
    model = Model(lora).to(dtype)
    if not unused:
        model.never.requires_grad_(False)
    return SHARDINGS[name](model)


def build(name, optimizer_name, *, scope="tensor", step_size=None, kept=None, moved=False, **options):
    """A sharded model and its optimizer; with `moved` every parameter starts elsewhere. The options are `shard`'s."""
    model = shard(name, **options)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.125)
    optimizer = optimizer_for(model, optimizer_name, scope=scope, step_size=step_size, kept=kept)
    if hasattr(optimizer, "attach"):
        optimizer.attach(model)
    return model, optimizer


def optimizer_for(model, optimizer_name, *, scope="tensor", step_size=None, kept=None):
    """One of ours or of torch's, with two groups that differ; `kept` says how weights and states are kept."""
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    groups = [
        {"params": [value for key, value in trained.items() if "bias" not in key], "weight_decay": 0.1},
        {"params": [value for key, value in trained.items() if "bias" in key], "lr": 0.03},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer_name in THEIRS:
        return THEIRS[optimizer_name](groups, lr=0.02)
    options = {**(kept or {}), **({} if step_size is None else {"step_size": step_size})}
    return getattr(hf_tam, optimizer_name)(groups, lr=0.02, scope=scope, damping_eps=1e-6, **options)


def train(model, optimizer, first, last):
    """Steps `first` to `last`; each has its own batch, so that a run may be stopped anywhere."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (model(batch, step) - batch[:, :3].sin()).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer):
    """Every parameter and every state tensor, whole and flattened, by name; the same on every rank.

    A state of nothing but zeros is left out: no step was taken, whether the state was made yet or not.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        held = {"value": parameter.detach(), **optimizer.state.get(parameter, {})}
        if isinstance(model, FullyShardedDataParallel):
            held = _joined(held)
        else:
            held = {
                key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for key, tensor in held.items()
            }
        if not any(tensor.any() for key, tensor in held.items() if key != "value"):
            held = {"value": held["value"]}
        name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
        tensors.update({f"{name}.{key}": tensor.clone().reshape(-1) for key, tensor in held.items()})
    return tensors


def _joined(held):
    """What FSDP1 has cut: consecutive slices of the flattened parameter, and numbers that all ranks must agree on."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {key: tensor.clone() for key, tensor in held.items()})
    joined = {}
    for key in sorted({key for rank in ranks for key in rank}):
        parts = [rank[key] for rank in ranks if key in rank]
        assert parts[0].dim() or all(torch.equal(part, parts[0]) for part in parts), f"the ranks' {key}: {parts}"
        joined[key] = torch.cat(parts) if parts[0].dim() else parts[0]
    return joined


def hyperparameters(optimizer):
    """What the groups hold besides parameters, tuples and lists alike."""
    return [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def _bits(tensor):
    """Of corrections some look like NaN, which equals nothing."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def differences(actual, expected):
    """The names of tensors that are not equal to the last bit, or are on one side only."""
    return sorted(
        name
        for name in actual.keys() | expected.keys()
        if name not in actual
        or name not in expected
        or actual[name].dtype != expected[name].dtype
        or not torch.equal(_bits(actual[name]), _bits(expected[name]))
    )


def distance(actual, expected):
    """The largest difference of any tensor, relative to its largest value, or to 1 where that is less."""
    return max(
        ((actual[name] - value).abs().max() / value.abs().max().clamp(min=1)).item()
        for name, value in expected.items()
    )


def disagreements(optimizer):
    """The positions of parameters whose scalar states are not the same on every rank."""
    numbers = [
        [optimizer.state[parameter][key].item() for key in optimizer.scalar_states]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    ]
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, numbers)
    return [position for position, rows in enumerate(zip(*ranks, strict=True)) if len(set(map(tuple, rows))) > 1]


def write_expected(folder, expected):
    """Rank 0 writes what a resumed run is to be compared with."""
    if dist.get_rank() == 0:
        torch.save(expected, os.path.join(folder, "expected.pt"))
    dist.barrier()


def read_expected(folder):
    return torch.load(os.path.join(folder, "expected.pt"), weights_only=True)


def save(folder, model, optimizer, format):
    """Write a checkpoint in one of torch's formats; called by every rank."""
    WRITERS[format](os.path.join(folder, format), model, optimizer)


def load(folder, model, optimizer, format, *, partial=False):
    """Load what `save` wrote; `partial` lets torch.distributed.checkpoint pass over what the checkpoint lacks."""
    options = {"partial": partial} if format in ("dcp", "full") else {}
    READERS[format](os.path.join(folder, format), model, optimizer, **options)


def _sharded_state(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _write_dcp(path, model, optimizer):
    dcp.save(_sharded_state(model, optimizer), checkpoint_id=path)


def _read_dcp(path, model, optimizer, *, partial=False):
    state = _sharded_state(model, optimizer)
    # A rank that holds nothing of one of FSDP1's tensors would take the checkpoint for one of torch 2.3
    # (torch 2.13, checkpoint/default_planner.py, create_local_plan); flattening is for FSDP1 over tensor parallelism.
    flatten = not isinstance(model, FullyShardedDataParallel)
    planner = DefaultLoadPlanner(flatten_sharded_tensors=flatten, allow_partial_load=partial)
    dcp.load(state, checkpoint_id=path, planner=planner)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _full(model):
    # FSDP1 on the CPU with offload: every state is a view of one buffer, which the next state overwrites (torch 2.13,
    # torch/distributed/fsdp/_optim_utils.py, _allgather_orig_param_states). A GPU's are copied to the host.
    return StateDictOptions(full_state_dict=True, cpu_offload=not isinstance(model, FullyShardedDataParallel))


def _write_full(path, model, optimizer):
    options = _full(model)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()


def _read_full(path, model, optimizer, *, partial=False):
    state = torch.load(path, weights_only=True)
    options = _full(model)
    if partial:  # groups with other keys than ours are loaded only so
        options.broadcast_from_rank0 = True
        state = state if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


@contextlib.contextmanager
def _fsdp1_state(model, *, full):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if full:
            configs = FullStateDictConfig(offload_to_cpu=False), FullOptimStateDictConfig(offload_to_cpu=False)
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, *configs):
                yield
        else:
            with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
                yield


def _write_fsdp1_full(path, model, optimizer):
    with _fsdp1_state(model, full=True):
        state = {
            "model": model.state_dict(),
            "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer),
        }
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()


def _read_fsdp1_full(path, model, optimizer):
    """FSDP1's whole state, into FSDP1, FSDP2 or a model that is not sharded."""
    state = torch.load(path, weights_only=True)
    if not isinstance(model, FullyShardedDataParallel):
        return _read_full(path, model, optimizer)
    with _fsdp1_state(model, full=True):
        model.load_state_dict(state["model"])
        flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state["optimizer"])
    return optimizer.load_state_dict(flat)


def _write_ranks(path, model, optimizer):
    """Each rank's own part, as torch.save has it."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}-{dist.get_rank()}.pt")
    dist.barrier()


def _read_ranks(path, model, optimizer):
    state = torch.load(f"{path}-{dist.get_rank()}.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


WRITERS = {"dcp": _write_dcp, "full": _write_full, "fsdp1-full": _write_fsdp1_full, "ranks": _write_ranks}
READERS = {"dcp": _read_dcp, "full": _read_full, "fsdp1-full": _read_fsdp1_full, "ranks": _read_ranks}
