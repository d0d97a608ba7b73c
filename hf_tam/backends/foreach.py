"""The multi-tensor backend: `torch._foreach_*` over windows of tensors, as torch.optim does on accelerators.

Fewer launches than `single`, at the price of temporaries of the size of a window. On an accelerator the scalars are
0-d tensors, which torch's multi-tensor kernels take one tensor at a time, and the sums are `single`'s: right, not
fast. fp16 and bf16 are computed in fp32 and rounded once, as in the other backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.single import partial_sums
from hf_tam.backends.whole import no_whole_step as whole_step

__all__ = ["adam", "partial_sums", "sgd", "whole_step"]

_TEMPORARY = 1 << 24
"""Elements handled together: at most 64 MiB for each fp32 temporary, unless one tensor alone is larger."""


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    for positions in _windows(entries):
        window = [entries[position] for position in positions]
        grads = [scalars.grad(entry, position) for entry, position in zip(window, positions, strict=True)]
        stored = [entry.param for entry in window], [entry.first for entry in window], _seconds(window)
        params, firsts, seconds = (_working(tensors) for tensors in stored)
        grads = _working(grads)
        column = _columns(scalars, positions, params[0].dtype)
        torch._foreach_mul_(params, column["decay"])
        torch._foreach_lerp_(firsts, grads, column["first_weight"])
        squares = torch._foreach_mul(grads, column["second_weight"])
        torch._foreach_mul_(squares, grads)
        torch._foreach_mul_(seconds, column["second_decay"])
        torch._foreach_add_(seconds, list(squares))
        del squares
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_add_(denominators, column["eps"])
        updates = torch._foreach_div(firsts, denominators)
        torch._foreach_mul_(updates, column["step_size"])
        torch._foreach_sub_(params, updates)
        _store(stored, (params, firsts, seconds))


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    for positions in _windows(entries):
        window = [entries[position] for position in positions]
        grads = [scalars.grad(entry, position) for entry, position in zip(window, positions, strict=True)]
        stored = [entry.param for entry in window], [entry.first for entry in window]
        params, firsts = (_working(tensors) for tensors in stored)
        column = _columns(scalars, positions, params[0].dtype)
        torch._foreach_mul_(firsts, column["momentum"])
        torch._foreach_add_(firsts, list(torch._foreach_mul(_working(grads), column["gain"])))
        torch._foreach_sub_(params, list(torch._foreach_mul(firsts, column["step_size"])))
        _store(stored, (params, firsts))


def _windows(entries: Sequence[Entry]) -> Iterator[list[int]]:
    """Positions of tensors of one dtype, in windows of about `_TEMPORARY` elements."""
    for dtype in dict.fromkeys(entry.param.dtype for entry in entries):
        window: list[int] = []
        size = 0
        for position, entry in enumerate(entries):
            if entry.param.dtype != dtype:
                continue
            if window and size + entry.param.numel() > _TEMPORARY:
                yield window
                window, size = [], 0
            window.append(position)
            size += entry.param.numel()
        yield window


def _seconds(window: Sequence[Entry]) -> list[Tensor]:
    return [entry.second for entry in window if entry.second is not None]


def _working(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors themselves, or fp32 copies of those with less precision."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _store(stored: Sequence[list[Tensor]], results: Sequence[list[Tensor]]) -> None:
    for tensors, values in zip(stored, results, strict=True):
        if tensors[0].dtype != values[0].dtype:
            torch._foreach_copy_(tensors, values)


def _columns(scalars: StepScalars, positions: Sequence[int], dtype: torch.dtype) -> dict[str, list[Any]]:
    # torch types its lists of numbers and its lists of tensors apart; a column is either, never a mixture. A tensor
    # must have the dtype of what it weighs.
    picked = {name: [column[position] for position in positions] for name, column in scalars.columns.items()}
    return {
        name: [value.to(dtype) if isinstance(value, Tensor) else value for value in column]
        for name, column in picked.items()
    }
