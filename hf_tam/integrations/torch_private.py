"""What is relied on of torch and is not documented, in one place. Nothing here communicates.

Seen in torch 2.9 to 2.13. What torch.optim itself calls (`torch._foreach_*`, `torch._fused_adamw_`) is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FSDP1_MARK = "_fsdp_flattened"
"""Attribute of the parameters that FSDP1 keeps slices of; torch/distributed/fsdp/_flat_param.py."""
WRAPPER_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP1, activation checkpointing and torch.compile put into the names of parameters."""


class FlatPart(NamedTuple):
    """A parameter of which FSDP1 keeps a slice here.

    Attributes:
        param: The parameter itself.
        name: What it is called in its FSDP unit.
        shape: The shape that FSDP1 cut.
        below: The DTensorSpec of the DTensor whose local shard that was; None where it was no DTensor.
        group: The process group over which the unit is cut; None where it is not.
    """

    param: Tensor
    name: str
    shape: tuple[int, ...]
    below: Any
    group: Any


def is_sliced(param: Tensor) -> bool:
    """Whether FSDP1 keeps a slice of the parameter."""
    return bool(getattr(param, FSDP1_MARK, False))


def is_flat(param: Tensor) -> bool:
    """Whether FSDP1 made the parameter out of others."""
    return bool(getattr(param, "_is_flat_param", False))


def flat_shapes(param: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what is in a flat parameter of FSDP1's."""
    return [tuple(shape) for shape in getattr(param, "_shapes", ())]


def flat_parts(module: nn.Module) -> Iterator[FlatPart]:
    """Every original parameter below `module` that FSDP1 sliced."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None:
            continue
        # With NO_SHARD the unit has a process group, and every rank the whole of it.
        flat, group = handle.flat_param, handle.process_group if handle.uses_sharded_strategy else None
        columns = (flat._params or [], flat._fqns, flat._shapes, flat._param_extensions)
        for param, name, shape, below in zip(*columns, strict=True):
            yield FlatPart(param, name, tuple(shape), below, group)


def specs(params: Sequence[Tensor]) -> list[Any]:
    """How each DTensor is cut and how large it is, None for what is none; asked of thousands of tensors a step."""
    return list(map(getattr, params, repeat("_spec"), repeat(None)))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Those of the module itself. FSDP1 has a `named_parameters` of its own, which gives them other names."""
    return module._parameters


def is_strided_shard(placement: object) -> bool:
    """What FSDP2 makes on top of tensor parallelism: no Shard, and its is_shard() is False."""
    return type(placement).__name__ == "_StridedShard"


def default_group() -> Any:
    """The process group of all ranks."""
    return torch.distributed.distributed_c10d._get_default_group()


def default_store() -> Any:
    """The key-value store of all ranks; None where there is none (MPI)."""
    return torch.distributed.distributed_c10d._get_default_store()


def device_types(group: Any) -> list[str]:
    """Of the devices that the backends of a process group reach, the preferred one first."""
    return [device.type for device in group._device_types]


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and no values (FakeTensorMode, by which memory is estimated)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def is_written_outside_inference_mode(tensor: Tensor) -> bool:
    """Whether torch lets it be written to there; one that got its `.data` from inference mode may be."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def has_no_memory(tensor: Tensor) -> bool:
    """Whether the tensor is one of zeros that torch has given no memory, as autograd makes gradients."""
    return bool(torch._is_zerotensor(tensor))
