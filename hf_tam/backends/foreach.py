"""The multi-tensor backend: `torch._foreach_*` over all tensors of one dtype, as torch.optim does on accelerators.

Arithmetic is in the tensors' own dtype, as in torch.optim's foreach implementation: fp16 and bf16 are rounded after
every operation. Temporaries of the size of the group are the price of few launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.single import partial_sums

__all__ = ["adam", "partial_sums", "sgd"]


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    for positions in _by_dtype(entries):
        params, grads, firsts = _operands(entries, scalars, positions)
        seconds = [second for position in positions if (second := entries[position].second) is not None]
        decay, first_weight, second_weight, step_size, eps = (
            _pick(scalars, name, positions, params[0].dtype)
            for name in ("decay", "first_weight", "second_weight", "step_size", "eps")
        )
        torch._foreach_mul_(params, decay)
        torch._foreach_lerp_(firsts, grads, first_weight)
        torch._foreach_lerp_(seconds, torch._foreach_mul(grads, grads), second_weight)
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_add_(denominators, eps)
        updates = torch._foreach_div(firsts, denominators)
        torch._foreach_mul_(updates, step_size)
        torch._foreach_sub_(params, updates)


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    for positions in _by_dtype(entries):
        params, grads, firsts = _operands(entries, scalars, positions)
        momentum, gain, step_size = (
            _pick(scalars, name, positions, params[0].dtype) for name in ("momentum", "gain", "step_size")
        )
        torch._foreach_mul_(firsts, momentum)
        torch._foreach_add_(firsts, list(torch._foreach_mul(grads, gain)))
        torch._foreach_sub_(params, list(torch._foreach_mul(firsts, step_size)))


def _by_dtype(entries: Sequence[Entry]) -> Iterator[list[int]]:
    groups: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        groups[entry.param.dtype].append(position)
    return iter(groups.values())


def _operands(
    entries: Sequence[Entry], scalars: StepScalars, positions: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [entries[position].param for position in positions]
    grads = [scalars.grad(entries[position], position) for position in positions]
    return params, grads, [entries[position].first for position in positions]


def _pick(scalars: StepScalars, name: str, positions: Sequence[int], dtype: torch.dtype) -> list[Any]:
    # torch types its lists of numbers and its lists of tensors apart; these are either, never a mixture.
    column = scalars.columns[name]
    picked = [column[position] for position in positions]
    return [value.to(dtype) if isinstance(value, Tensor) else value for value in picked]
