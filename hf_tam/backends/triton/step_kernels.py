"""From the partial sums of whole tensors to the end of their step in one launch: angle, coefficients, update.

For steps in which nothing is shared between tensors. Every program works out its tensor's coefficients by itself, from
the same numbers, so that nothing has to happen between the sums and the update. The formulas are those of
`hf_tam.update`, in fp64.
"""

import triton
import triton.language as tl

from hf_tam.backends.triton.chunks import locate
from hf_tam.backends.triton.sums_kernels import tensor_sums
from hf_tam.backends.triton.update_kernels import update_chunk

REPORTS = 6
"""Columns of `reports`: the four sums, the cosine, the damping."""

_REPORTS = tl.constexpr(REPORTS)


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
def _advance(cosine, torque, step, gamma, damping_eps, torque_steps, LITERAL: tl.constexpr):
    """The torque after this step, the damping it applies, and c_t. `step` counts the steps before this one."""
    neutral = 1.0 if LITERAL else 0.5
    active = step < torque_steps
    torque = tl.where(active, gamma * torque + (1.0 - gamma) * cosine, torque)
    damping = (1.0 + torque) / 2.0
    return torque, tl.where(active, damping, neutral), tl.where(active, damping_eps + damping, neutral)


@triton.jit
def _report(totals, tensor, cosine, damping, kept, reports, keeps, skipped, SKIP: tl.constexpr):
    own = reports + tensor * _REPORTS
    for column in tl.static_range(4):
        tl.store(own + column, totals[column])
    tl.store(own + 4, cosine)
    tl.store(own + 5, damping)
    if SKIP:
        tl.store(keeps + tensor, kept.to(tl.uint8))
        if not kept:
            tl.atomic_add(skipped, 1)


@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def adam_step_kernel(
    tensors, grads, owners, partials, scalars, before, reports, keeps, skipped, lr_pointer,
    first_chunk: tl.int64, num_tensors: tl.int64, lr: tl.float64, weight_decay: tl.float64,
    gamma: tl.float64, damping_eps: tl.float64, torque_steps: tl.float64, beta1: tl.float64, log_beta1: tl.float64,
    beta2: tl.float64, log_beta2: tl.float64, eps: tl.float64, coupled_decay: tl.float64,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, LITERAL: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adaptive step. Rows of the scalar states: step, exp_avg_scale, torque.

    They are read from `before` and written to `scalars`, by the program of the first chunk, which also writes what is
    reported.
    """
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, row, start, length = locate(tensors, owners, chunk)
    totals = tensor_sums(partials, row)
    step = tl.load(before + tensor).to(tl.float64)
    scale = tl.load(before + num_tensors + tensor).to(tl.float64)
    torque = tl.load(before + 2 * num_tensors + tensor).to(tl.float64)
    # A moment whose scale is 0 is no moment, whatever is stored.
    cosine = tl.where(scale > 0.0, _cosine(totals[0], totals[1], totals[2]), 0.0)
    torque, damping, gain = _advance(cosine, torque, step, gamma, damping_eps, torque_steps, LITERAL)
    if not LITERAL:
        gain *= 2.0 * (1.0 - beta1)
    scale = beta1 * scale + gain
    step += 1.0
    if lr_pointer is not None:
        lr = tl.load(lr_pointer).to(tl.float64)
    step_size = lr * scale
    root = tl.full((), 1.0, tl.float64)
    if not LITERAL:
        root = tl.sqrt(_one_minus_power(log_beta2, step))
        step_size *= root / _one_minus_power(log_beta1, step)
    kept = tl.full((), 1, tl.int1)
    if SKIP:
        kept = tl.abs(totals[3]) < float("inf")
    if start == 0:
        _report(totals, tensor, cosine, damping, kept, reports, keeps, skipped, SKIP)
        own = scalars + tensor
        tl.store(own, step.to(tl.float32), mask=kept)
        tl.store(own + num_tensors, scale.to(tl.float32), mask=kept)
        tl.store(own + 2 * num_tensors, torque.to(tl.float32), mask=kept)
    weights = (
        tl.cast(1.0 - lr * weight_decay, COMPUTE),
        tl.where(scale > 0.0, gain / tl.where(scale > 0.0, scale, 1.0), 1.0).to(COMPUTE),
        tl.cast(beta2, COMPUTE),
        tl.cast(1.0 - beta2, COMPUTE),
        step_size.to(COMPUTE),
        (eps * root).to(COMPUTE),
    )
    update_chunk(
        row, tl.load(grads + tensor), start, tl.where(kept, length, 0), None, coupled_decay, weights,
        DTYPE, GRAD_DTYPE, ALIGNED, COUPLED, MAXIMIZE, True, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def sgd_step_kernel(
    tensors, grads, owners, partials, scalars, before, reports, keeps, skipped, lr_pointer,
    first_chunk: tl.int64, num_tensors: tl.int64, lr: tl.float64,
    gamma: tl.float64, damping_eps: tl.float64, torque_steps: tl.float64, momentum: tl.float64,
    coupled_decay: tl.float64, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, LITERAL: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The momentum step, see `adam_step_kernel`. Rows of the scalar states: step, torque."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, row, start, length = locate(tensors, owners, chunk)
    totals = tensor_sums(partials, row)
    step = tl.load(before + tensor).to(tl.float64)
    torque = tl.load(before + num_tensors + tensor).to(tl.float64)
    cosine = _cosine(totals[0], totals[1], totals[2])
    torque, damping, gain = _advance(cosine, torque, step, gamma, damping_eps, torque_steps, LITERAL)
    if not LITERAL:
        gain *= 2.0
    if lr_pointer is not None:
        lr = tl.load(lr_pointer).to(tl.float64)
    kept = tl.full((), 1, tl.int1)
    if SKIP:
        kept = tl.abs(totals[3]) < float("inf")
    if start == 0:
        _report(totals, tensor, cosine, damping, kept, reports, keeps, skipped, SKIP)
        own = scalars + tensor
        tl.store(own, (step + 1.0).to(tl.float32), mask=kept)
        tl.store(own + num_tensors, torque.to(tl.float32), mask=kept)
    weights = (tl.cast(momentum, COMPUTE), gain.to(COMPUTE), tl.cast(lr, COMPUTE))
    update_chunk(
        row, tl.load(grads + tensor), start, tl.where(kept, length, 0), None, coupled_decay, weights,
        DTYPE, GRAD_DTYPE, ALIGNED, COUPLED, MAXIMIZE, False, BLOCK,
    )  # fmt: skip
