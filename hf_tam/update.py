r"""Torque-Aware Momentum as pure functions of tensors: no optimizer, no rank, no parameter list.

The four lines of the paper (arXiv 2412.18790, section 3), for one angle:

    s_t = <m_{t-1}, g_t> / (|m_{t-1}| |g_t|)          `cosine`
    S_t = gamma S_{t-1} + (1 - gamma) s_t             `torque`
    d_t = (1 + S_t) / 2                               `damping`
    m_t = beta1 m_{t-1} + (damping_eps + d_t) g_t     `adam_step` and `sgd_step`, by the numbers of `scalar_stage`

`scalar_stage` is all of a step but its tensors. It works on 1-D tensors with one entry a logical parameter tensor
(fp64 where the device has it, see `accumulator_dtype`), so that the whole of the scalar arithmetic of a step is a
handful of operations whatever the number of tensors, and never leaves the device.

Nothing in this module communicates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam.precision import joined, split

Scalar = float | Tensor
"""A Python number, or a 0-d tensor on the parameter's device where the host must not read it."""

NUM_SUMS = 4
"""Columns of the sums of a tensor: <m, g>, |m|^2, |g|^2 and the raw |g|^2."""
RAW_GRAD_SQ = 3
"""The column of the raw |g|^2: of the gradient as the backward pass left it, before clipping, sign and decay."""

_WITHOUT_FP64 = frozenset({"mps", "npu"})


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
    # The root of each and not of their product, which overflows, or vanishes, long before the norms do.
    quotient = dot / (momentum_sq.sqrt() * grad_sq.sqrt())
    # 0/0 is usual: in a first step, for LoRA's A matrices, and in the step of zero gradients by which
    # torch.distributed.checkpoint makes states. A NaN would reach the parameters, with a rate of 0 too: 0 * NaN is
    # NaN. Rounding may take the quotient beyond 1, and the damping with it.
    return torch.where(quotient.isfinite(), quotient, 0.0).clamp(-1.0, 1.0)


def torque(previous: Tensor, cosine: Tensor, *, gamma: Scalar) -> Tensor:
    """S_t = gamma S_{t-1} + (1 - gamma) s_t."""
    return gamma * previous + (1.0 - gamma) * cosine


def damping(torque: Tensor) -> Tensor:
    """d_t = (1 + S_t) / 2, in [0, 1]."""
    return (1.0 + torque) / 2.0


class Numbers(NamedTuple):
    """The hyperparameters of a step, as arithmetic wants them: a float for all tensors, or one a tensor, shape (n,).

    Made by `adam_numbers` and `sgd_numbers`. The kernels take the same fields in the same order.
    """

    lr: Scalar
    weight_decay: Scalar  # decoupled
    coupled_decay: Scalar  # this many times the parameter belong to the gradient
    beta1: Scalar  # or the momentum
    log_beta1: Scalar  # of the bias correction 1 - beta1^t; -inf: none, as for a beta1 of 0
    beta2: Scalar
    log_beta2: Scalar
    second_weight: Scalar  # 1 - beta2
    eps: Scalar
    gamma: Scalar
    damping_eps: Scalar
    torque_steps: Scalar  # inf: always
    unit: Scalar  # what a gradient weighs in the kept moment for each c_t, see `moment_unit`
    neutral: Scalar  # the c_t that weighs a gradient as AdamW or SGD does

    @property
    def torque_ends(self) -> bool:
        """Whether `torque_steps` is finite for any tensor."""
        return isinstance(self.torque_steps, Tensor) or self.torque_steps != math.inf

    def floats(self) -> list[float]:
        """The fields of one param group, 0 for a learning rate that the host does not know."""
        return [0.0 if isinstance(value, Tensor) else value for value in self]


NEUTRAL = 0.5
"""c_t at S_t = 0 and damping_eps = 0."""


def moment_unit(beta1: float, *, averaged: bool) -> float:
    """What the calibrated moment is in units of the paper's m: AdamW's exp_avg = 2 (1 - beta1) m, SGD's buffer = 2 m.

    1 / NEUTRAL times what a gradient weighs in torch's own moment, so that the neutral angle is torch's optimizer.
    """
    return (1.0 - beta1 if averaged else 1.0) / NEUTRAL


def adam_numbers(group: Mapping[str, Any], *, coupled: bool) -> Numbers:
    """The numbers of an adaptive step.

    With `step_size="paper"` the recurrence is taken literally: no average, no bias correction.

    Args:
        group: A param group. Its `lr` is a tensor where the host must not read it.
        coupled: Whether the weight decay belongs to the gradient.
    """
    beta1, beta2 = group["betas"]
    literal = group["step_size"] == "paper"
    return Numbers(
        lr=group["lr"],
        weight_decay=0.0 if coupled else group["weight_decay"],
        coupled_decay=group["weight_decay"] if coupled else 0.0,
        beta1=beta1,
        log_beta1=-math.inf if literal or beta1 == 0.0 else math.log(beta1),
        beta2=beta2,
        log_beta2=-math.inf if literal or beta2 == 0.0 else math.log(beta2),
        second_weight=1.0 - beta2,
        eps=group["eps"],
        gamma=group["gamma"],
        damping_eps=group["damping_eps"],
        torque_steps=math.inf if group["torque_steps"] is None else float(group["torque_steps"]),
        unit=1.0 if literal else moment_unit(beta1, averaged=True),
        neutral=1.0 if literal else NEUTRAL,
    )


def sgd_numbers(group: Mapping[str, Any]) -> Numbers:
    """The numbers of a momentum step, whose decay is coupled; see `adam_numbers`."""
    literal = group["step_size"] == "paper"
    return Numbers(
        lr=group["lr"],
        weight_decay=0.0,
        coupled_decay=group["weight_decay"],
        beta1=group["momentum"],
        log_beta1=-math.inf,
        beta2=0.0,
        log_beta2=-math.inf,
        second_weight=0.0,
        eps=0.0,
        gamma=group["gamma"],
        damping_eps=group["damping_eps"],
        torque_steps=math.inf if group["torque_steps"] is None else float(group["torque_steps"]),
        unit=1.0 if literal else moment_unit(group["momentum"], averaged=False),
        neutral=1.0 if literal else NEUTRAL,
    )


class AdamCoefficients(NamedTuple):
    """The numbers one adaptive step needs for each tensor; see `adam_step`. Shape (n,) each."""

    decay: Tensor
    first_weight: Tensor
    second_decay: Tensor
    second_weight: Tensor
    step_size: Tensor
    eps: Tensor


class SgdCoefficients(NamedTuple):
    """The numbers one momentum step needs for each tensor; see `sgd_step`. Shape (n,) each."""

    momentum: Tensor
    gain: Tensor
    step_size: Tensor


Coefficients = AdamCoefficients | SgdCoefficients


class Stage(NamedTuple):
    """What `scalar_stage` finds, shape (n,) each.

    Attributes:
        states: The new scalar states by name.
        coefficients: What the tensors are updated with.
        cosine: s_t.
        damping: The damping applied.
        factor: c_t, the factor on the gradient.
    """

    states: dict[str, Tensor]
    coefficients: Coefficients
    cosine: Tensor
    damping: Tensor
    factor: Tensor


def scalar_stage(
    sums: Sequence[Tensor], states: Mapping[str, Tensor], numbers: Numbers, *, shared: bool = False
) -> Stage:
    """All of a step but its tensors: from the sums to the torque, and from there to the coefficients of the update.

    The kernels have dialects of this function, of the same name: native/scalar_stage.h, triton/scalar_stage.py.

    The first moment of the adaptive optimizers is kept normalised, m_t = scale_t exp_avg_t, with an exp_avg that is a
    weighted mean, so that it moves by an ordinary lerp as AdamW's own does, with another weight for each tensor:

        scale_t   = beta1 scale_{t-1} + gain_t,   gain_t = unit c_t
        exp_avg_t = exp_avg_{t-1} + weight_t (g_t - exp_avg_{t-1}),   weight_t = gain_t / scale_t

    Learning rate, scale and bias correction are one step size:

        lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
            = lr scale sqrt(1 - beta2^t) / (1 - beta1^t)  *  exp_avg / (sqrt(v) + eps sqrt(1 - beta2^t))

    Args:
        sums: <m_{t-1}, g_t>, |m_{t-1}|^2 and |g_t|^2, shape (n,) each; m in any scale, the same in both.
        states: `step` and `torque` before this step, and `exp_avg_scale` of an adaptive optimizer.
        numbers: The hyperparameters.
        shared: Whether the sums are those of one angle for all tensors, see `shared_sums`.
    """
    step, previous, scale = states["step"], states["torque"], states.get("exp_avg_scale")
    dot, momentum_sq, grad_sq = sums
    if scale is not None and not shared:  # a moment whose scale is 0 is no moment, whatever is stored
        dot = torch.where(scale > 0.0, dot, 0.0)
    angle = cosine(dot, momentum_sq, grad_sq)
    turned = torque(previous, angle, gamma=numbers.gamma)
    applied = damping(turned)
    factor = numbers.damping_eps + applied
    # Afterwards it is AdamW (SGD) itself, so damping_eps is left out too; the torque is kept for who looks at it.
    if numbers.torque_ends:
        active = step < numbers.torque_steps
        turned = torch.where(active, turned, previous)
        applied = torch.where(active, applied, numbers.neutral)
        factor = torch.where(active, factor, numbers.neutral)
    gain, ones, step = numbers.unit * factor, torch.ones_like(step), step + 1.0
    if scale is None:
        coefficients = SgdCoefficients(momentum=ones * numbers.beta1, gain=gain, step_size=ones * numbers.lr)
        return Stage({"step": step, "torque": turned}, coefficients, angle, applied, factor)
    scale = numbers.beta1 * scale + gain
    root = torch.sqrt(_one_minus_power(numbers.log_beta2, step))
    adam = AdamCoefficients(
        decay=ones * (1.0 - numbers.lr * numbers.weight_decay),
        # Where the scale is 0 nothing of any gradient is left (beta1 = 0 and an opposed gradient): with a weight of 1
        # the mean is that of the last gradient, and never 0/0.
        first_weight=torch.where(scale > 0.0, gain / scale, 1.0),
        second_decay=ones * numbers.beta2,
        second_weight=ones * numbers.second_weight,
        step_size=numbers.lr * scale * root / _one_minus_power(numbers.log_beta1, step),
        eps=numbers.eps * root,
    )
    return Stage({"step": step, "exp_avg_scale": scale, "torque": turned}, adam, angle, applied, factor)


def shared_sums(sums: Sequence[Tensor], scale: Tensor | None, numbers: Numbers) -> Tensor:
    """<m, g>, |m|^2 and |g|^2 of n tensors together, for the paper's m, so that others' can be added: shape (3,).

    Args:
        sums: As in `scalar_stage`.
        scale: The state `exp_avg_scale`, None where the moment is not kept normalised.
        numbers: The hyperparameters.
    """
    dot, momentum_sq, grad_sq = sums
    factor = (torch.ones_like(dot) if scale is None else scale) / numbers.unit
    return torch.stack([dot * factor, momentum_sq * factor.square(), grad_sq]).sum(1)


def _one_minus_power(log_beta: Scalar, step: Tensor) -> Tensor:
    """1 - beta^t, without the cancellation that would cost fp32 accumulators five digits at the first steps."""
    return -torch.expm1(step * log_beta)


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
    correction: Tensor | None = None,
) -> None:
    """One adaptive step of one tensor: changes `param`, `exp_avg`, `exp_avg_sq` and `correction` in place.

    All tensors have the same shape and any strides. Computed in the widest of their dtypes, fp32 at least, and rounded
    once. With a correction (see `hf_tam.precision`) the weights are what it and the parameter are together.
    """
    stored = (param, exp_avg, exp_avg_sq)
    dtype = _working_dtype(*stored, grad)
    if any(tensor.dtype != dtype for tensor in (*stored, grad)):
        work = _widened(stored, correction, dtype)
        adam_step(
            work[0], grad.to(dtype), work[1], work[2], decay=decay, first_weight=first_weight,
            second_decay=second_decay, second_weight=second_weight, step_size=step_size, eps=eps,
        )  # fmt: skip
        _store(work, stored, correction)
        return
    param.mul_(decay)
    # torch.lerp takes a tensor weight only in the dtype of its operands
    exp_avg.lerp_(grad, first_weight.to(dtype) if isinstance(first_weight, Tensor) else first_weight)
    # Not by lerp_, which makes NaN of an infinite second moment, where AdamW's step is 0 (torch 2.13); and the weight
    # first, for (w g) g overflows later than w (g g).
    exp_avg_sq.mul_(second_decay).add_(grad * second_weight * grad)
    param.sub_(exp_avg / (exp_avg_sq.sqrt() + eps) * step_size)


def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    momentum: Scalar,
    gain: Scalar,
    step_size: Scalar,
    correction: Tensor | None = None,
) -> None:
    """One momentum step of one tensor: m_t = momentum m_{t-1} + gain g_t, then param -= step_size m_t, in place.

    As `adam_step`, shapes and dtypes alike.
    """
    stored = (param, momentum_buffer)
    dtype = _working_dtype(*stored, grad)
    if any(tensor.dtype != dtype for tensor in (*stored, grad)):
        work = _widened(stored, correction, dtype)
        sgd_step(work[0], grad.to(dtype), work[1], momentum=momentum, gain=gain, step_size=step_size)
        _store(work, stored, correction)
        return
    momentum_buffer.mul_(momentum).add_(grad * gain)
    param.sub_(momentum_buffer * step_size)


def _widened(stored: Sequence[Tensor], correction: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The weights and moments to compute with."""
    first = stored[0] if correction is None else joined(stored[0], correction)
    return [first.to(dtype), *(tensor.to(dtype) for tensor in stored[1:])]


def _store(work: Sequence[Tensor], stored: Sequence[Tensor], correction: Tensor | None) -> None:
    if correction is None:
        stored[0].copy_(work[0])
    else:
        split(work[0], stored[0], correction)
    for tensor, result in zip(stored[1:], work[1:], strict=True):
        tensor.copy_(result)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of their dtypes, and fp32 at least."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
