"""From the partial sums of whole tensors to the end of their step in one launch: scalar stage and update.

For steps in which nothing is shared between tensors. Every program works out its tensor's coefficients by itself, from
the same numbers, so that nothing has to happen between the sums and the update.
"""

import triton
import triton.language as tl

from hf_tam.backends.triton.chunks import GROUP, coupled_decay_of, locate, numbers_of
from hf_tam.backends.triton.scalar_stage import learning_rate, scalar_stage_adam, scalar_stage_sgd
from hf_tam.backends.triton.sums_kernels import tensor_sums
from hf_tam.backends.triton.update_kernels import update_chunk

REPORTS = 6
"""Columns of `reports`: the four sums, the cosine, the damping."""

_REPORTS = tl.constexpr(REPORTS)


@triton.jit
def _is_kept(raw_sq, SKIP: tl.constexpr):
    kept = tl.full((), 1, tl.int1)
    if SKIP:
        kept = tl.abs(raw_sq) < float("inf")
    return kept


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
    tensors, grads, chunk_places, numbers, lrs, partials, scalars, before, reports, keeps, skipped,
    first_chunk: tl.int64, num_tensors: tl.int64, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr, CORRECTED: tl.constexpr, ALIGNED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adaptive step. Rows of the scalar states: step, exp_avg_scale, torque.

    They are read from `before` and written to `scalars`, by the program of the first chunk, which also writes what is
    reported.
    """
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    # The last chunk first, as in `update_chunk`: the sums went forwards, and their end is what the L2 may still hold.
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, row, start, length = locate(tensors, chunk_places, chunk)
    totals, own = tensor_sums(partials, row), numbers_of(row, numbers)
    step = tl.load(before + tensor).to(tl.float64)
    scale = tl.load(before + num_tensors + tensor).to(tl.float64)
    torque = tl.load(before + 2 * num_tensors + tensor).to(tl.float64)
    lr = learning_rate(own, lrs, tl.load(row + GROUP))
    step, scale, torque, cosine, damping, weights = scalar_stage_adam(totals, step, scale, torque, lr, own)
    kept = _is_kept(totals[3], SKIP)
    if start == 0:
        _report(totals, tensor, cosine, damping, kept, reports, keeps, skipped, SKIP)
        states = scalars + tensor
        tl.store(states, step.to(tl.float32), mask=kept)
        tl.store(states + num_tensors, scale.to(tl.float32), mask=kept)
        tl.store(states + 2 * num_tensors, torque.to(tl.float32), mask=kept)
    cast = (
        weights[0].to(COMPUTE), weights[1].to(COMPUTE), weights[2].to(COMPUTE),
        weights[3].to(COMPUTE), weights[4].to(COMPUTE), weights[5].to(COMPUTE),
    )  # fmt: skip
    update_chunk(
        row, tl.load(grads + tensor), start, tl.where(kept, length, 0), None,
        coupled_decay_of(row, numbers, COUPLED), cast, DTYPE, GRAD_DTYPE, MOMENT_DTYPE, CORRECTED, ALIGNED, COUPLED,
        MAXIMIZE, True, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def sgd_step_kernel(
    tensors, grads, chunk_places, numbers, lrs, partials, scalars, before, reports, keeps, skipped,
    first_chunk: tl.int64, num_tensors: tl.int64, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr, CORRECTED: tl.constexpr, ALIGNED: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The momentum step, see `adam_step_kernel`. Rows of the scalar states: step, torque."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, row, start, length = locate(tensors, chunk_places, chunk)
    totals, own = tensor_sums(partials, row), numbers_of(row, numbers)
    step = tl.load(before + tensor).to(tl.float64)
    torque = tl.load(before + num_tensors + tensor).to(tl.float64)
    lr = learning_rate(own, lrs, tl.load(row + GROUP))
    step, torque, cosine, damping, weights = scalar_stage_sgd(totals, step, torque, lr, own)
    kept = _is_kept(totals[3], SKIP)
    if start == 0:
        _report(totals, tensor, cosine, damping, kept, reports, keeps, skipped, SKIP)
        states = scalars + tensor
        tl.store(states, step.to(tl.float32), mask=kept)
        tl.store(states + num_tensors, torque.to(tl.float32), mask=kept)
    cast = (weights[0].to(COMPUTE), weights[1].to(COMPUTE), weights[2].to(COMPUTE))
    update_chunk(
        row, tl.load(grads + tensor), start, tl.where(kept, length, 0), None,
        coupled_decay_of(row, numbers, COUPLED), cast, DTYPE, GRAD_DTYPE, MOMENT_DTYPE, CORRECTED, ALIGNED, COUPLED,
        MAXIMIZE, False, BLOCK,
    )  # fmt: skip
