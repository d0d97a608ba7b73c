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
from collections.abc import Container, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import single
from hf_tam.backends.entry import Entry, Layout, StepScalars
from hf_tam.backends.whole import no_whole_step as whole_step
from hf_tam.update import accumulator_dtype

__all__ = ["adam", "fits_kernel", "is_dense", "layout_of", "partial_sums", "sgd", "whole_step"]

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
        raw_sq = _square(raw)
        return [0.0, 0.0, raw_sq, raw_sq]
    grad = entry.grad()
    dot, momentum_sq, grad_sq = _products(entry, grad)
    return [dot, momentum_sq, grad_sq, grad_sq if grad is raw else _square(raw)]


def _products(entry: Entry, grad: Tensor) -> tuple[float, float, float]:
    """<m, g>, |m|^2 and |g|^2 of the first moment and a gradient, in one walk over memory."""
    layout, first = layout_of(entry), entry.first
    if layout.chunks is None:
        layout.chunks = _chunks(first) if is_dense(first) else ()
    chunks = layout.chunks
    if chunks and grad.stride() == first.stride():
        pairs = list(zip(chunks, _chunks(grad), strict=True))
    else:
        pairs = list(zip(torch.split(first.reshape(-1), CHUNK), torch.split(grad.reshape(-1), CHUNK), strict=True))
    dtype = torch.promote_types(first.dtype, torch.float32)
    sums = _chunked_products(pairs, dtype=None if dtype == first.dtype == grad.dtype else dtype)
    low, high = _SAFE_SQUARES
    if low < sums[1] < high and low < sums[2] < high:
        return sums
    # Rare: overflow, underflow or a non-finite element. fp64 tells them apart; an all-zero tensor stays zero.
    return _chunked_products(pairs, dtype=torch.float64)


def _chunked_products(
    pairs: Sequence[tuple[Tensor, Tensor]], *, dtype: torch.dtype | None
) -> tuple[float, float, float]:
    dot = first_sq = grad_sq = 0.0
    for first, grad in pairs:
        if dtype is not None:
            first, grad = first.to(dtype), grad.to(dtype)
        dot += torch.dot(first, grad).item()
        grad_sq += torch.dot(grad, grad).item()
        first_sq += torch.dot(first, first).item()
    return dot, first_sq, grad_sq


def _square(tensor: Tensor) -> float:
    """|tensor|^2."""
    chunks = _chunks(tensor) if is_dense(tensor) else torch.split(tensor.reshape(-1), CHUNK)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    low, high = _SAFE_SQUARES
    total = math.fsum(torch.dot(chunk, chunk).item() for chunk in (chunk.to(dtype) for chunk in chunks))
    if low < total < high:
        return total
    return sum(torch.dot(chunk, chunk).item() for chunk in (chunk.double() for chunk in chunks))


def _chunks(dense: Tensor) -> Sequence[Tensor]:
    """The elements of a dense tensor in memory order, in pieces of `CHUNK`."""
    count = dense.numel()
    flat = dense.view(-1) if dense.is_contiguous() else dense.as_strided((count,), (1,))
    return (flat,) if count <= CHUNK else torch.split(flat, CHUNK)


def layout_of(entry: Entry) -> Layout:
    """How the parameter and its moments lie in memory; found out once for as long as they stay there."""
    layout, param, first, second = entry.layout, entry.param, entry.first, entry.second
    addresses = (param.data_ptr(), first.data_ptr(), 0 if second is None else second.data_ptr())
    if layout is None or layout.addresses != addresses:
        moments = [first] if second is None else [first, second]
        same = all(moment.dtype == param.dtype and moment.stride() == param.stride() for moment in moments)
        fits = same and type(param) in (Tensor, torch.nn.Parameter) and is_dense(param)
        layout = entry.layout = Layout(fits, addresses)
    return layout


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


def fits_kernel(entry: Entry, grad: Tensor, *, dtypes: Container[torch.dtype]) -> bool:
    """Whether raw pointers lead a kernel for `dtypes` to the right elements of parameter, gradient and moments."""
    param = entry.param
    return (
        layout_of(entry).is_uniform
        and param.dtype in dtypes
        and grad.dtype == param.dtype
        and grad.stride() == param.stride()
    )


def _aligned_grad(entry: Entry) -> Tensor:
    """The entry's gradient in the parameter's memory order; a copy only where it came in another."""
    grad = entry.grad()
    if grad.stride() == entry.param.stride() or not layout_of(entry).is_uniform:
        return grad
    return torch.empty_like(entry.param, dtype=grad.dtype).copy_(grad)


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    neutral_step = torch.tensor(math.inf)
    grad_scale = None if scalars.clip is None else _grad_scale(cast("float", scalars.clip))
    for position, entry in enumerate(entries):
        row, grad = cast("dict[str, float]", scalars.row(position)), _aligned_grad(entry)
        beta1, step_size = 1.0 - row["first_weight"], row["step_size"]
        # A weight or step size of 0 leaves the kernel a 0/0 (decay / step_size, 1 - beta1^inf).
        if beta1 == 1.0 or step_size == 0.0 or not fits_kernel(entry, grad, dtypes=_ADAM_DTYPES):
            single.adam_tensor(entry, scalars.clipped(grad), scalars.row(position))
            continue
        assert entry.second is not None
        torch._fused_adamw_(
            [entry.param], [grad], [entry.first], [entry.second], [], [neutral_step],
            amsgrad=False, maximize=False, lr=step_size, beta1=beta1, beta2=row["second_decay"],
            weight_decay=(1.0 - row["decay"]) / step_size, eps=row["eps"], grad_scale=grad_scale,
        )  # fmt: skip
        increment_version(entry.param)


def _grad_scale(clip: float) -> Tensor:
    """What torch's kernels divide the gradients by."""
    return torch.tensor(1.0 / clip if clip else math.inf)


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    grad_scale = None if scalars.clip is None else _grad_scale(cast("float", scalars.clip))
    for position, entry in enumerate(entries):
        row, grad = cast("dict[str, float]", scalars.row(position)), _aligned_grad(entry)
        # Without momentum the kernel leaves the buffer, and with it the gain, aside.
        if row["momentum"] == 0.0 or not fits_kernel(entry, grad, dtypes=_SGD_DTYPES):
            single.sgd_tensor(entry, scalars.clipped(grad), scalars.row(position))
            continue
        torch._fused_sgd_(
            [entry.param], [grad], [entry.first],
            weight_decay=0.0, momentum=row["momentum"], lr=row["step_size"], dampening=1.0 - row["gain"],
            nesterov=False, maximize=False, is_first_step=False, grad_scale=grad_scale,
        )  # fmt: skip
        increment_version(entry.param)
