"""From local partial sums to those of whole logical tensors.

This version holds whole tensors only (one device, DDP): nothing has to be reduced, and a tensor that is only a part
of a logical one is refused, because an angle of a part is another angle. `select_reducer` is the one place that
chooses.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

_REMEDY = (
    "An angle needs the whole tensor, and this version of hf_tam is exact on one device and under DDP only: "
    "use DDP (accelerate's MULTI_GPU), or --optim adamw_torch with this wrapper."
)


class Reducer(Protocol):
    """Turns the partial sums of what this rank holds into the sums of whole logical tensors."""

    def reduce(self, sums: Tensor) -> Tensor:
        """Sums of whole tensors, shape and dtype of `sums`, (n, columns) with one row a logical tensor."""


class LocalReducer:
    """For whole tensors: the local sums are the global ones. No communication."""

    def reduce(self, sums: Tensor) -> Tensor:
        """Return `sums` as they are."""
        return sums


def select_reducer(params: Sequence[Tensor], known: Container[Tensor]) -> Reducer:
    """Choose the reducer for the tensors an optimizer is about to update.

    Args:
        params: What stands in `param_groups` now, in order.
        known: The parameters that the user handed over, or that an attached module owns.

    Raises:
        RuntimeError: A tensor is sharded, flattened, or was put in place of the user's parameters by a wrapper.
    """
    for position, param in enumerate(params):
        reason = _why_not_whole(param, known)
        if reason:
            shape = tuple(param.shape)
            raise RuntimeError(
                f"hf_tam cannot take the angle of parameter {position} (shape {shape}): {reason}. {_REMEDY}"
            )
    return LocalReducer()


def _why_not_whole(param: Tensor, known: Container[Tensor]) -> str | None:
    if type(param) not in (torch.nn.Parameter, Tensor) and _is_dtensor(param):
        return "it is a DTensor (FSDP2, HSDP or tensor parallelism)"
    # FSDP1 marks the parameters it keeps slices of; torch/distributed/fsdp/_flat_param.py.
    if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        return "FSDP1 keeps only a slice of it on each rank"
    if param not in known:
        return (
            "it is not one of the parameters this optimizer was built with, so a wrapper (such as DeepSpeed ZeRO) "
            "put a flat or sharded buffer in their place; if you replaced it yourself, call optimizer.attach(module)"
        )
    return None


def _is_dtensor(param: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor)
