"""The CPU backend: torch's vectorised fused kernels, one call a tensor, and sums in chunks that stay in the cache.

The normalised first moment moves by a plain lerp (`update.scalar_stage`), which is what torch's fused AdamW kernel
computes with beta1 = 1 - weight. The learning rate handed over is the step size, which already holds both bias
corrections; the kernel's own are made 1 by a step count of infinity (beta^inf = 0).

The kernels walk raw pointers: a parameter, gradient and states that do not share one dense layout, one dtype and the
plain tensor type go to `single`. Seen in torch 2.13: `torch.optim.AdamW(fused=True)` does not look, and is silently
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import single
from hf_tam.backends.single import one_pass
from hf_tam.backends.tensors import Tensors, is_dense
from hf_tam.update import AdamCoefficients, Coefficients, Scalar

__all__ = ["one_pass", "partial_sums", "update"]

CHUNK = 1 << 16
"""Elements summed in one go: two fp32 chunks (512 KiB) stay in a core's L2 while three products are taken of them, and
fp32 partial sums of this length are within 1e-7 of the fp64 ones (a whole torch.dot of 4e7 elements is off by
7e-4)."""

_ADAM_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# torch 2.13's fused SGD kernel is wrong on the CPU in fp16 and bf16 from 16 elements on: off by 2 for values about 1.
_SGD_DTYPES = frozenset({torch.float32, torch.float64})
_SAFE_SQUARES = (1e-24, 1e36)
"""Sums of fp32 squares outside this range are taken again in fp64: they may have lost, or overflowed, a term."""


def partial_sums(tensors: Tensors, *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    rows = [_sums(tensors, at, dot) for at, dot in enumerate(with_dot)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(rows), 4)


def _sums(tensors: Tensors, at: int, with_dot: bool) -> list[float]:
    raw = tensors.grads[at]
    if not with_dot:
        raw_sq = _square(raw)
        return [0.0, 0.0, raw_sq, raw_sq]
    grad = tensors.grad(at)
    dot, momentum_sq, grad_sq = _products(tensors.firsts[at], grad)
    return [dot, momentum_sq, grad_sq, grad_sq if grad is raw else _square(raw)]


def _products(first: Tensor, grad: Tensor) -> tuple[float, float, float]:
    """<m, g>, |m|^2 and |g|^2 of the first moment and a gradient, in one walk over memory."""
    if is_dense(first) and grad.stride() == first.stride():
        pairs = list(zip(_chunks(first), _chunks(grad), strict=True))
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


def update(
    tensors: Tensors, coefficients: Coefficients, *, keep: Tensor | None, clip: Scalar | None, on_host: bool
) -> None:
    """See `Backend.update`; always on the host."""
    assert on_host
    assert keep is None
    assert not isinstance(clip, Tensor)
    columns = single.columns_of(coefficients, on_host=True)
    kernel = _fused_adam if isinstance(coefficients, AdamCoefficients) else _fused_sgd
    grad_scale = None if clip is None else _grad_scale(clip)
    for at, param in enumerate(tensors.params):
        row = {name: float(column[at]) for name, column in columns.items()}
        if kernel(tensors, at, row, grad_scale):
            # torch's fused kernels do not (2.13, CPU), and autograd would take the new values where a graph has saved
            # the old ones.
            increment_version(param)
        else:
            single.update_tensor(tensors, at, single.gradient(tensors, at, keep=None, clip=clip), row)


def _grad_scale(clip: float) -> Tensor:
    """What torch's kernels divide the gradients by."""
    return torch.tensor(1.0 / clip if clip else math.inf, dtype=torch.float32, device="cpu")


def _fused_adam(tensors: Tensors, at: int, row: dict[str, float], grad_scale: Tensor | None) -> bool:
    """Update one tensor by torch's kernel; False, with nothing done, where it cannot."""
    beta1, step_size = 1.0 - row["first_weight"], row["step_size"]
    # A weight or step size of 0 leaves the kernel a 0/0 (decay / step_size, 1 - beta1^inf).
    grad = None if beta1 == 1.0 or step_size == 0.0 else _kernels_grad(tensors, at, dtypes=_ADAM_DTYPES)
    if grad is None:
        return False
    # The kernel subtracts lr * weight_decay times the parameter, and its lr is the step size here.
    torch._fused_adamw_(
        [tensors.params[at]], [grad], [tensors.firsts[at]], [tensors.seconds[at]], [],
        [torch.tensor(math.inf, dtype=torch.float32, device="cpu")],
        amsgrad=False, maximize=False, lr=step_size, beta1=beta1, beta2=row["second_decay"],
        weight_decay=(1.0 - row["decay"]) / step_size, eps=row["eps"], grad_scale=grad_scale,
    )  # fmt: skip
    return True


def _fused_sgd(tensors: Tensors, at: int, row: dict[str, float], grad_scale: Tensor | None) -> bool:
    """As `_fused_adam`."""
    # Without momentum the kernel leaves the buffer, and with it the gain, aside.
    grad = None if row["momentum"] == 0.0 else _kernels_grad(tensors, at, dtypes=_SGD_DTYPES)
    if grad is None:
        return False
    # Never a first step: in that the kernel sets the buffer to the gradient, and leaves the gain, its dampening,
    # aside.
    torch._fused_sgd_(
        [tensors.params[at]], [grad], [tensors.firsts[at]],
        weight_decay=0.0, momentum=row["momentum"], lr=row["step_size"], dampening=1.0 - row["gain"],
        nesterov=False, maximize=False, is_first_step=False, grad_scale=grad_scale,
    )  # fmt: skip
    return True


def _kernels_grad(tensors: Tensors, at: int, *, dtypes: Container[torch.dtype]) -> Tensor | None:
    """The gradient in its parameter's memory order, a copy only where it came in another.

    None where raw pointers would not lead a kernel for `dtypes` to the right elements.
    """
    param = tensors.params[at]
    if not tensors.memory.walkable[at] or param.dtype not in dtypes or tensors.corrections:
        return None
    if tensors.firsts[at].dtype != param.dtype:
        return None
    grad = tensors.grad(at)
    if grad.dtype != param.dtype:
        return None
    # Autograd of complex numbers leaves gradients that are to be negated when they are read, which torch's kernels
    # refuse, in the middle of a list.
    fits = grad.stride() == param.stride() and not grad.is_neg()
    return grad if fits else torch.empty_like(param).copy_(grad)
