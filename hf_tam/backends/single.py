"""The readable backend: one tensor at a time, plain torch operations, any layout, any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.whole import no_whole_step as whole_step
from hf_tam.update import Scalar

__all__ = ["adam", "adam_tensor", "partial_sums", "sgd", "sgd_tensor", "whole_step"]


def partial_sums(entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    return torch.stack([_tensor_sums(entry, dot) for entry, dot in zip(entries, with_dot, strict=True)])


def _tensor_sums(entry: Entry, with_dot: bool) -> Tensor:
    dtype = update.accumulator_dtype(entry.param.device)
    if not with_dot:
        raw_sq = entry.raw_grad.to(dtype).square().sum()
        return torch.stack([torch.zeros_like(raw_sq)] * 2 + [raw_sq, raw_sq])
    sums = update.partial_sums(entry.first, entry.grad())
    raw_sq = sums[2] if entry.has_raw_grad else entry.raw_grad.to(dtype).square().sum()
    return torch.cat([sums, raw_sq.reshape(1)])


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    for position, entry in enumerate(entries):
        adam_tensor(entry, scalars.grad(entry, position), scalars.row(position))


def adam_tensor(entry: Entry, grad: Tensor, row: dict[str, Scalar]) -> None:
    """One adaptive step of one entry."""
    assert entry.second is not None
    update.adam_step(entry.param, grad, entry.first, entry.second, **_with_lerp_weight(entry, row))


def _with_lerp_weight(entry: Entry, row: dict[str, Scalar]) -> dict[str, Any]:
    # torch.lerp takes a tensor weight only in the dtype of its operands; fp16 and bf16 are computed in fp32.
    dtype = torch.promote_types(entry.param.dtype, torch.float32)
    weight = row["first_weight"]
    return {**row, "first_weight": weight.to(dtype) if isinstance(weight, Tensor) else weight}


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    for position, entry in enumerate(entries):
        sgd_tensor(entry, scalars.grad(entry, position), scalars.row(position))


def sgd_tensor(entry: Entry, grad: Tensor, row: dict[str, Scalar]) -> None:
    """One momentum step of one entry."""
    update.sgd_step(entry.param, grad, entry.first, **row)
