r"""Torque-Aware Momentum as pure functions of tensors: no optimizer, no rank, no parameter list.

The four lines of the paper (arXiv 2412.18790, section 3), for one angle:

    s_t = <m_{t-1}, g_t> / (|m_{t-1}| |g_t|)          `cosine`
    S_t = gamma S_{t-1} + (1 - gamma) s_t             `torque`
    d_t = (1 + S_t) / 2                               `damping`
    m_t = beta1 m_{t-1} + (damping_eps + d_t) g_t     `momentum`, or `first_moment` in its normalised form

`cosine`, `torque`, `damping` and the functions that prepare a step work on 1-D tensors with one entry a logical
parameter tensor (fp64 where the device has it, see `accumulator_dtype`), so that the whole of the scalar arithmetic
of a step is a handful of operations whatever the number of tensors, and never leaves the device.

Nothing in this module communicates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
"""A Python number, or a 0-d tensor on the parameter's device where the host must not read it."""

_WITHOUT_FP64 = frozenset({"mps", "npu"})
_LOW_PRECISION = frozenset({torch.float16, torch.bfloat16})


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and per-tensor scalars on `device`: float64 where the device has it, float32 otherwise."""
    if device.type == "xpu":  # Arc has no float64, Data Center GPU Max has
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def partial_sums(momentum: Tensor, grad: Tensor) -> Tensor:
    """What one tensor, or one shard of it, contributes to its angle.

    Args:
        momentum: The first moment, any shape and any positive scaling.
        grad: The gradient, the shape of `momentum`.

    Returns:
        <momentum, grad>, |momentum|^2 and |grad|^2 as a tensor of shape (3,), accumulated in `accumulator_dtype`:
        where that is float64, finite fp32, bf16 or fp16 elements can neither overflow nor vanish.
    """
    dtype = accumulator_dtype(grad.device)
    momentum, grad = momentum.to(dtype), grad.to(dtype)
    return torch.stack([(momentum * grad).sum(), momentum.square().sum(), grad.square().sum()])


def cosine(dot: Tensor, momentum_sq: Tensor, grad_sq: Tensor) -> Tensor:
    """s_t = <m, g> / (|m| |g|), in [-1, 1]; 0 where either norm is 0 or the quotient is not a finite number.

    Args:
        dot: <m_{t-1}, g_t>, shape (n,).
        momentum_sq: |m_{t-1}|^2, shape (n,).
        grad_sq: |g_t|^2, shape (n,).
    """
    quotient = dot / (momentum_sq.sqrt() * grad_sq.sqrt())
    return torch.where(quotient.isfinite(), quotient, 0.0).clamp(-1.0, 1.0)


def torque(previous: Tensor, cosine: Tensor, *, gamma: float) -> Tensor:
    """S_t = gamma S_{t-1} + (1 - gamma) s_t."""
    return gamma * previous + (1.0 - gamma) * cosine


def damping(torque: Tensor) -> Tensor:
    """d_t = (1 + S_t) / 2, in [0, 1]."""
    return (1.0 + torque) / 2.0


class FirstMoment(NamedTuple):
    """How the normalised first moment moves in one step, shape (n,) each."""

    scale: Tensor
    weight: Tensor


def first_moment(scale: Tensor, gain: Tensor, *, beta1: float) -> FirstMoment:
    """m_t = beta1 m_{t-1} + gain_t g_t, kept as m_t = scale_t * exp_avg_t with an exp_avg that is a weighted mean.

        scale_t   = beta1 scale_{t-1} + gain_t
        exp_avg_t = exp_avg_{t-1} + weight_t (g_t - exp_avg_{t-1}),   weight_t = gain_t / scale_t

    which is an ordinary lerp: the same arithmetic as AdamW's own first moment, with another weight for each tensor.

    Args:
        scale: scale_{t-1}, shape (n,); 0 before the first step.
        gain: The factor on the gradient, shape (n,): c_t (paper) or 2 (1 - beta1) c_t (calibrated).
        beta1: Decay of the first moment.

    Returns:
        scale_t and weight_t. Where scale_t is 0 nothing of any gradient is left (beta1 = 0 and an opposed gradient)
        and the weight is 1, so that the mean is that of the last gradient and never 0/0.
    """
    scale = beta1 * scale + gain
    return FirstMoment(scale, torch.where(scale > 0.0, gain / scale, 1.0))


class AdamCoefficients(NamedTuple):
    """The numbers one adaptive step needs for each tensor; see `adam_step`. Shape (n,) each."""

    decay: Tensor
    first_weight: Tensor
    second_decay: Tensor
    second_weight: Tensor
    step_size: Tensor
    eps: Tensor


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 - beta^t, without the cancellation that would cost fp32 accumulators five digits at the first steps."""
    return -torch.expm1(step * math.log(beta)) if beta > 0.0 else torch.ones_like(step)


class SgdCoefficients(NamedTuple):
    """The numbers one momentum step needs for each tensor; see `sgd_step`. Shape (n,) each."""

    momentum: Tensor
    gain: Tensor
    step_size: Tensor


def adam_coefficients(
    step: Tensor,
    moment: FirstMoment,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    decay: Scalar,
    corrected: bool,
) -> AdamCoefficients:
    """Fold learning rate, bias correction and the scale of the first moment into one step size a tensor.

    With `corrected` (calibrated, design of torch.optim.AdamW):

        lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
            = lr scale sqrt(1 - beta2^t) / (1 - beta1^t)  *  exp_avg / (sqrt(v) + eps sqrt(1 - beta2^t))

    Without it (the paper's recurrence): lr m / (sqrt(v) + eps).

    Args:
        step: t, counted from 1, shape (n,).
        moment: The first moment of this step.
        lr: Learning rate.
        betas: Decays of the first and second moment.
        eps: Term added to the denominator.
        decay: Factor on the parameter, 1 - lr * weight_decay (1 where the decay is coupled or absent).
        corrected: Whether both moments are bias-corrected.
    """
    beta1, beta2 = betas
    ones = torch.ones_like(step)
    root = torch.sqrt(_one_minus_power(beta2, step)) if corrected else ones
    return AdamCoefficients(
        decay=ones * decay,
        first_weight=moment.weight,
        second_decay=ones * beta2,
        second_weight=ones * (1.0 - beta2),
        step_size=lr * moment.scale * root / _one_minus_power(beta1, step) if corrected else lr * moment.scale,
        eps=eps * root,
    )


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    decay: Scalar,
    first_weight: Scalar,
    second_decay: Scalar,
    second_weight: Scalar,
    step_size: Scalar,
    eps: Scalar,
) -> None:
    """One adaptive step of one tensor: changes `param`, `exp_avg` and `exp_avg_sq` in place.

    All four tensors have the same shape and any strides. fp16 and bf16 are computed in fp32 and rounded once.
    """
    if param.dtype in _LOW_PRECISION:
        stored = (param, exp_avg, exp_avg_sq)
        work = [tensor.float() for tensor in stored]
        adam_step(
            work[0], grad.float(), work[1], work[2], decay=decay, first_weight=first_weight,
            second_decay=second_decay, second_weight=second_weight, step_size=step_size, eps=eps,
        )  # fmt: skip
        for tensor, result in zip(stored, work, strict=True):
            tensor.copy_(result)
        return
    param.mul_(decay)
    exp_avg.lerp_(grad, first_weight)
    exp_avg_sq.mul_(second_decay).add_(grad * second_weight * grad)
    param.sub_(exp_avg / (exp_avg_sq.sqrt() + eps) * step_size)


def sgd_step(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, momentum: Scalar, gain: Scalar, step_size: Scalar
) -> None:
    """One momentum step of one tensor: m_t = momentum m_{t-1} + gain g_t, then param -= step_size m_t, in place.

    The three tensors have the same shape and any strides. fp16 and bf16 are computed in fp32 and rounded once.
    """
    if param.dtype in _LOW_PRECISION:
        work = [tensor.float() for tensor in (param, momentum_buffer)]
        sgd_step(work[0], grad.float(), work[1], momentum=momentum, gain=gain, step_size=step_size)
        param.copy_(work[0])
        momentum_buffer.copy_(work[1])
        return
    momentum_buffer.mul_(momentum).add_(grad * gain)
    param.sub_(momentum_buffer * step_size)
