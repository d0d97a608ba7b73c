"""The multi-tensor backend: `torch._foreach_*` over windows of tensors, as torch.optim does on accelerators.

Fewer launches than `single`, at the price of temporaries of the size of a window. On an accelerator the scalars are
0-d tensors, which torch's multi-tensor kernels take one tensor at a time, and the sums are `single`'s: right, not
fast. fp16 and bf16 are computed in fp32 and rounded once, as in the other backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam.backends.single import columns_of, gradient, one_pass, partial_sums
from hf_tam.backends.tensors import Tensors
from hf_tam.precision import split
from hf_tam.update import AdamCoefficients, Coefficients, Scalar

__all__ = ["one_pass", "partial_sums", "update"]

_TEMPORARY = 1 << 24
"""Elements handled together: at most 64 MiB for each fp32 temporary, unless one tensor alone is larger."""


def update(
    tensors: Tensors, coefficients: Coefficients, *, keep: Tensor | None, clip: Scalar | None, on_host: bool
) -> None:
    """See `Backend.update`."""
    columns = columns_of(coefficients, on_host=on_host)
    run = _adam if isinstance(coefficients, AdamCoefficients) else _sgd
    for places in _windows(tensors):
        grads = [gradient(tensors, at, keep=keep, clip=clip) for at in places]
        stored = [[held[at] for at in places] for held in (tensors.params, tensors.firsts, tensors.seconds) if held]
        dtype = _working_dtype(tensors, places[0])
        work = [[tensor.to(dtype) for tensor in held] for held in stored]
        if tensors.corrections:
            work[0] = [tensors.weights(at) for at in places]
        run(work, [grad.to(dtype) for grad in grads], _picked(columns, places, dtype))
        if tensors.corrections:
            for at, weights in zip(places, work[0], strict=True):
                split(weights, tensors.params[at], tensors.corrections[at])
            del stored[0], work[0]
        for held, results in zip(stored, work, strict=True):
            if any(tensor is not result for tensor, result in zip(held, results, strict=True)):
                torch._foreach_copy_(held, results)


def _adam(held: Sequence[list[Tensor]], grads: list[Tensor], column: Mapping[str, list[Any]]) -> None:
    """`update.adam_step` of parameters, first and second moments."""
    params, firsts, seconds = held
    torch._foreach_mul_(params, column["decay"])
    torch._foreach_lerp_(firsts, grads, column["first_weight"])
    # In the order of `update.adam_step`, whose reasons hold here too.
    squares = torch._foreach_mul(grads, column["second_weight"])
    torch._foreach_mul_(squares, grads)
    torch._foreach_mul_(seconds, column["second_decay"])
    torch._foreach_add_(seconds, list(squares))
    del squares  # before the next temporaries of a window's size
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_add_(denominators, column["eps"])
    updates = torch._foreach_div(firsts, denominators)
    torch._foreach_mul_(updates, column["step_size"])
    torch._foreach_sub_(params, updates)


def _sgd(held: Sequence[list[Tensor]], grads: list[Tensor], column: Mapping[str, list[Any]]) -> None:
    """`update.sgd_step` of parameters and first moments."""
    params, firsts = held
    torch._foreach_mul_(firsts, column["momentum"])
    torch._foreach_add_(firsts, list(torch._foreach_mul(grads, column["gain"])))
    torch._foreach_sub_(params, list(torch._foreach_mul(firsts, column["step_size"])))


def _windows(tensors: Tensors) -> Iterator[list[int]]:
    """Places of tensors that are computed in one dtype, in windows of about `_TEMPORARY` elements."""
    dtypes = [(param.dtype, _working_dtype(tensors, at)) for at, param in enumerate(tensors.params)]
    for wanted in dict.fromkeys(dtypes):
        window: list[int] = []
        size = 0
        for at, (param, dtype) in enumerate(zip(tensors.params, dtypes, strict=True)):
            if dtype != wanted:
                continue
            if window and size + param.numel() > _TEMPORARY:
                yield window
                window, size = [], 0
            window.append(at)
            size += param.numel()
        yield window


def _working_dtype(tensors: Tensors, at: int) -> torch.dtype:
    held = [lists[at] for lists in (tensors.params, tensors.firsts, tensors.seconds, tensors.grads) if lists]
    dtype = torch.float32
    for tensor in held:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _picked(
    columns: Mapping[str, Sequence[Scalar]], places: Sequence[int], dtype: torch.dtype
) -> dict[str, list[Any]]:
    # torch types its lists of numbers and its lists of tensors apart; a column is either, never a mixture. A tensor
    # must have the dtype of what it weighs.
    picked = {name: [column[at] for at in places] for name, column in columns.items()}
    return {
        name: [value.to(dtype) if isinstance(value, Tensor) else value for value in column]
        for name, column in picked.items()
    }
