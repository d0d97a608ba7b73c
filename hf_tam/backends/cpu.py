"""The CPU backend: torch's vectorised fused kernels, one call a tensor, and sums in chunks that stay in the cache.

The normalised first moment moves by a plain lerp (`update.first_moment`), which is what torch's fused AdamW kernel
computes with beta1 = 1 - weight. The learning rate handed over is the step size, which already holds both bias
corrections; the kernel's own are made 1 by a step count of infinity (beta^inf = 0).

The kernels walk raw pointers: a parameter, gradient and states that do not share one dense layout, one dtype and the
plain tensor type go to `single`. Seen in torch 2.13: `torch.optim.AdamW(fused=True)` does not look, and is silently
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import single
from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.foreach import write
from hf_tam.update import accumulator_dtype

__all__ = ["adam", "is_dense", "partial_sums", "sgd", "write"]

CHUNK = 1 << 16
"""Elements summed in one go: two fp32 chunks (512 KiB) stay in a core's L2 while three products are taken of them, and
fp32 partial sums of this length are within 1e-7 of the fp64 ones (a whole torch.dot of 4e7 elements is off by
7e-4)."""

_ADAM_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# torch 2.13's fused SGD kernel is wrong on the CPU in fp16 and bf16 from 16 elements on: off by 2 for values about 1.
_SGD_DTYPES = frozenset({torch.float32, torch.float64})
_SAFE_SQUARES = (1e-24, 1e36)
"""Sums of fp32 squares outside this range are taken again in fp64: they may have lost, or overflowed, a term."""


def partial_sums(entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    rows = [_tensor_sums(entry, dot) for entry, dot in zip(entries, with_dot, strict=True)]
    return torch.tensor(rows, dtype=accumulator_dtype(torch.device("cpu"))).reshape(len(rows), 4)


def _tensor_sums(entry: Entry, with_dot: bool) -> list[float]:
    raw = entry.raw_grad
    if not with_dot:
        raw_sq = _products(raw, raw)[2]
        return [0.0, 0.0, raw_sq, raw_sq]
    grad = entry.grad()
    dot, momentum_sq, grad_sq = _products(entry.first, grad)
    raw_sq = grad_sq if grad is raw else _products(raw, raw)[2]
    return [dot, momentum_sq, grad_sq, raw_sq]


def _products(left: Tensor, right: Tensor) -> tuple[float, float, float]:
    """<left, right>, |left|^2, |right|^2 in one walk over memory."""
    sums = _chunked_products(*_flat_pair(left, right), dtype=torch.promote_types(left.dtype, torch.float32))
    low, high = _SAFE_SQUARES
    if all(low < square < high for square in sums[1:]):
        return sums
    # Rare: overflow, underflow or a non-finite element. fp64 tells them apart; an all-zero tensor stays zero.
    return _chunked_products(*_flat_pair(left, right), dtype=torch.float64)


def _chunked_products(left: Tensor, right: Tensor, *, dtype: torch.dtype) -> tuple[float, float, float]:
    dot = left_sq = right_sq = 0.0
    small = left.numel() <= CHUNK
    chunks = [(left, right)] if small else zip(torch.split(left, CHUNK), torch.split(right, CHUNK), strict=True)
    for left_chunk, right_chunk in chunks:
        left_chunk, right_chunk = left_chunk.to(dtype), right_chunk.to(dtype)
        right_sq += torch.dot(right_chunk, right_chunk).item()
        if left is not right:
            dot += torch.dot(left_chunk, right_chunk).item()
            left_sq += torch.dot(left_chunk, left_chunk).item()
    return (right_sq, right_sq, right_sq) if left is right else (dot, left_sq, right_sq)


def _flat_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors as one dimension, their elements in the same order."""
    if left is right and is_dense(left):
        flat = left.as_strided((left.numel(),), (1,))
        return flat, flat
    if left.stride() == right.stride() and is_dense(left) and is_dense(right):
        return left.as_strided((left.numel(),), (1,)), right.as_strided((right.numel(),), (1,))
    flat = left.reshape(-1)
    return flat, flat if left is right else right.reshape(-1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _fits_kernel(entry: Entry, grad: Tensor, *, dtypes: frozenset[torch.dtype]) -> bool:
    param = entry.param
    others = [grad, entry.first] if entry.second is None else [grad, entry.first, entry.second]
    return (
        type(param) in (Tensor, torch.nn.Parameter)
        and param.dtype in dtypes
        and is_dense(param)
        and all(other.dtype == param.dtype and other.stride() == param.stride() for other in others)
    )


def _aligned_grad(entry: Entry) -> Tensor:
    """The entry's gradient in the parameter's memory order; a copy only where it came in another."""
    grad = entry.grad()
    if grad.stride() == entry.param.stride() or not is_dense(entry.param):
        return grad
    return torch.empty_like(entry.param, dtype=grad.dtype).copy_(grad)


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    neutral_step = torch.tensor(math.inf)
    for position, entry in enumerate(entries):
        row, grad = cast("dict[str, float]", scalars.row(position)), _aligned_grad(entry)
        beta1, step_size = 1.0 - row["first_weight"], row["step_size"]
        # A weight or step size of 0 leaves the kernel a 0/0 (decay / step_size, 1 - beta1^inf).
        if beta1 == 1.0 or step_size == 0.0 or not _fits_kernel(entry, grad, dtypes=_ADAM_DTYPES):
            single.adam_tensor(entry, grad, scalars.row(position))
            continue
        assert entry.second is not None
        torch._fused_adamw_(
            [entry.param], [grad], [entry.first], [entry.second], [], [neutral_step],
            amsgrad=False, maximize=False, lr=step_size, beta1=beta1, beta2=row["second_decay"],
            weight_decay=(1.0 - row["decay"]) / step_size, eps=row["eps"],
        )  # fmt: skip
        increment_version(entry.param)


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    for position, entry in enumerate(entries):
        row, grad = cast("dict[str, float]", scalars.row(position)), _aligned_grad(entry)
        # Without momentum the kernel leaves the buffer, and with it the gain, aside.
        if row["momentum"] == 0.0 or not _fits_kernel(entry, grad, dtypes=_SGD_DTYPES):
            single.sgd_tensor(entry, grad, scalars.row(position))
            continue
        torch._fused_sgd_(
            [entry.param], [grad], [entry.first],
            weight_decay=0.0, momentum=row["momentum"], lr=row["step_size"], dampening=1.0 - row["gain"],
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
        increment_version(entry.param)
