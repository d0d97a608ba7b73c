"""`hf_tam.update.scalar_stage` in Triton: from a tensor's sums to its torque and to the numbers of its update.

The hyperparameters come as a pointer to the fields of `hf_tam.update.Numbers`, the scalar states as numbers, fp64.
"""

import triton
import triton.language as tl

from hf_tam.update import Numbers

_LR, _WEIGHT_DECAY = (tl.constexpr(Numbers._fields.index(name)) for name in ("lr", "weight_decay"))
_BETA1, _LOG_BETA1 = (tl.constexpr(Numbers._fields.index(name)) for name in ("beta1", "log_beta1"))
_BETA2, _LOG_BETA2 = (tl.constexpr(Numbers._fields.index(name)) for name in ("beta2", "log_beta2"))
_SECOND_WEIGHT, _EPS = (tl.constexpr(Numbers._fields.index(name)) for name in ("second_weight", "eps"))
_GAMMA, _DAMPING_EPS = (tl.constexpr(Numbers._fields.index(name)) for name in ("gamma", "damping_eps"))
_TORQUE_STEPS, _UNIT = (tl.constexpr(Numbers._fields.index(name)) for name in ("torque_steps", "unit"))
_NEUTRAL = tl.constexpr(Numbers._fields.index("neutral"))


@triton.jit
def _cosine(dot, momentum_sq, grad_sq):
    norms = tl.sqrt(momentum_sq) * tl.sqrt(grad_sq)
    quotient = dot / tl.where(norms > 0.0, norms, 1.0)
    defined = (norms > 0.0) & (tl.abs(quotient) < float("inf"))
    return tl.minimum(tl.maximum(tl.where(defined, quotient, 0.0), -1.0), 1.0)


@triton.jit
def _one_minus_power(log_beta, step):
    # In fp64 what cancels here leaves more digits than an fp32 parameter has.
    return 1.0 - tl.exp(step * log_beta)


@triton.jit
def _advance(cosine, torque, step, numbers):
    """The torque after this step, the damping it applies, and the gradient's weight. `step` counts those before."""
    gamma, neutral = tl.load(numbers + _GAMMA), tl.load(numbers + _NEUTRAL)
    active = step < tl.load(numbers + _TORQUE_STEPS)
    torque = tl.where(active, gamma * torque + (1.0 - gamma) * cosine, torque)
    damping = (1.0 + torque) / 2.0
    factor = tl.where(active, tl.load(numbers + _DAMPING_EPS) + damping, neutral)
    return torque, tl.where(active, damping, neutral), tl.load(numbers + _UNIT) * factor


@triton.jit
def learning_rate(numbers, lrs, group):
    """That of the param group; `lrs` points to one a group where the host does not know them, or is None."""
    lr = tl.load(numbers + _LR)
    if lrs is not None:
        lr = tl.load(lrs + group).to(tl.float64)
    return lr


@triton.jit
def scalar_stage_adam(sums, step, scale, torque, lr, numbers):
    """The new states (step, exp_avg_scale, torque), cosine, damping, and the fields of AdamCoefficients."""
    # A moment whose scale is 0 is no moment, whatever is stored.
    cosine = tl.where(scale > 0.0, _cosine(sums[0], sums[1], sums[2]), 0.0)
    torque, damping, gain = _advance(cosine, torque, step, numbers)
    scale = tl.load(numbers + _BETA1) * scale + gain
    step += 1.0
    root = tl.sqrt(_one_minus_power(tl.load(numbers + _LOG_BETA2), step))
    coefficients = (
        1.0 - lr * tl.load(numbers + _WEIGHT_DECAY),
        tl.where(scale > 0.0, gain / tl.where(scale > 0.0, scale, 1.0), 1.0),
        tl.load(numbers + _BETA2),
        tl.load(numbers + _SECOND_WEIGHT),
        lr * scale * (root / _one_minus_power(tl.load(numbers + _LOG_BETA1), step)),
        tl.load(numbers + _EPS) * root,
    )
    return step, scale, torque, cosine, damping, coefficients


@triton.jit
def scalar_stage_sgd(sums, step, torque, lr, numbers):
    """The new states (step, torque), cosine, damping, and the fields of SgdCoefficients."""
    cosine = _cosine(sums[0], sums[1], sums[2])
    torque, damping, gain = _advance(cosine, torque, step, numbers)
    return step + 1.0, torque, cosine, damping, (tl.load(numbers + _BETA1), gain, lr)
