"""The readable backend: one tensor at a time, plain torch operations, any layout, any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_tam import update as formulas
from hf_tam.backends.protocol import OnePass
from hf_tam.backends.tensors import Tensors
from hf_tam.update import Coefficients, Scalar

__all__ = ["columns_of", "gradient", "one_pass", "partial_sums", "update", "update_tensor"]

one_pass: OnePass | None = None
"""Every step is taken in parts."""


def partial_sums(tensors: Tensors, *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    return torch.stack([_sums(tensors, at, dot) for at, dot in enumerate(with_dot)])


def _sums(tensors: Tensors, at: int, with_dot: bool) -> Tensor:
    raw = tensors.grads[at]
    dtype = formulas.accumulator_dtype(raw.device)
    if not with_dot:
        raw_sq = raw.to(dtype).square().sum()
        return torch.stack([torch.zeros_like(raw_sq)] * 2 + [raw_sq, raw_sq])
    grad = tensors.grad(at)
    sums = formulas.partial_sums(tensors.firsts[at], grad)
    raw_sq = sums[2] if grad is raw else raw.to(dtype).square().sum()
    return torch.cat([sums, raw_sq.reshape(1)])


def update(
    tensors: Tensors, coefficients: Coefficients, *, keep: Tensor | None, clip: Scalar | None, on_host: bool
) -> None:
    """See `Backend.update`."""
    columns = columns_of(coefficients, on_host=on_host)
    for at in range(len(tensors)):
        row = {name: column[at] for name, column in columns.items()}
        update_tensor(tensors, at, gradient(tensors, at, keep=keep, clip=clip), row)


def update_tensor(tensors: Tensors, at: int, grad: Tensor, row: Mapping[str, Scalar]) -> None:
    """Update one of the tensors by its row of the coefficients."""
    correction = tensors.corrections[at] if tensors.corrections else None
    if tensors.seconds:
        first, second = tensors.firsts[at], tensors.seconds[at]
        formulas.adam_step(tensors.params[at], grad, first, second, **row, correction=correction)
    else:
        formulas.sgd_step(tensors.params[at], grad, tensors.firsts[at], **row, correction=correction)


def columns_of(coefficients: Coefficients, *, on_host: bool) -> Mapping[str, Sequence[Scalar]]:
    """For each coefficient its values: Python floats on the host, 0-d tensors elsewhere."""
    if on_host:
        return dict(zip(coefficients._fields, torch.stack(list(coefficients)).tolist(), strict=True))
    return {name: column.unbind() for name, column in coefficients._asdict().items()}


def gradient(tensors: Tensors, at: int, *, keep: Tensor | None, clip: Scalar | None) -> Tensor:
    """The gradient of a tensor, clipped in fp32 at least; zero where the step is skipped.

    0 * NaN is NaN, so that a weight of 0 is not enough.
    """
    grad = tensors.grad(at)
    if clip is not None:
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        grad = grad * (clip.to(grad.dtype) if isinstance(clip, Tensor) else clip)
    return grad if keep is None else torch.where(keep[at], grad, 0.0)
