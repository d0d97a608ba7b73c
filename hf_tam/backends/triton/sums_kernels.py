"""The partial sums of the angle: one launch over all chunks, and one that adds up the chunks of each tensor.

Run-to-run bitwise identical: no number is added to by two programs.
"""

import triton
import triton.language as tl

from hf_tam.backends.triton.chunks import (
    FIRST,
    FIRST_CHUNK,
    MAX_CHUNKS,
    NUM_CHUNKS,
    SPAN,
    coupled_decay_of,
    effective_grad,
    load_block,
    load_weight,
    locate,
    pointer_to,
    row_of,
    weight_pointers,
)

_SPAN = tl.constexpr(SPAN)
_MAX_CHUNKS = tl.constexpr(MAX_CHUNKS)
_LOWEST, _HIGHEST = tl.constexpr(1e-24), tl.constexpr(1e36)  # sums of fp32 squares that have lost no term


@triton.jit
def _add_products(
    sums, pointers, index, length, coupled_decay,
    COMPUTE: tl.constexpr, CORRECTED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block's products to `sums`, which has an accumulator a lane for each column."""
    dot, momentum_sq, grad_sq, raw_sq = sums
    raw = load_block(pointers[2], index, length, COMPUTE, MASKED)
    moment = load_block(pointers[1], index, length, COMPUTE, MASKED)
    param = raw
    if COUPLED:
        param = load_weight(pointers[0], index, length, COMPUTE, CORRECTED, MASKED)
        raw_sq += raw * raw
    grad = effective_grad(raw, param, coupled_decay, COUPLED, MAXIMIZE)
    return dot + moment * grad, momentum_sq + moment * moment, grad_sq + grad * grad, raw_sq


@triton.jit
def _stretch_sums(
    pointers, begin, end, coupled_decay,
    COMPUTE: tl.constexpr, CORRECTED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The four sums over elements `begin` to `end`, accumulated in COMPUTE, as fp64 scalars."""
    zero = tl.zeros((BLOCK,), COMPUTE)
    sums = (zero, zero, zero, zero)
    decay = tl.cast(coupled_decay, COMPUTE)
    lanes = tl.arange(0, BLOCK)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for offset in range(begin, whole, BLOCK):
        sums = _add_products(sums, pointers, offset + lanes, end, decay, COMPUTE, CORRECTED, COUPLED, MAXIMIZE, False)
    if whole < end:
        sums = _add_products(sums, pointers, whole + lanes, end, decay, COMPUTE, CORRECTED, COUPLED, MAXIMIZE, True)
    dot, momentum_sq = tl.sum(sums[0]).to(tl.float64), tl.sum(sums[1]).to(tl.float64)
    grad_sq = tl.sum(sums[2]).to(tl.float64)
    raw_sq = grad_sq
    if COUPLED:
        raw_sq = tl.sum(sums[3]).to(tl.float64)
    return dot, momentum_sq, grad_sq, raw_sq


@triton.jit
def _lossless(square):
    return (square > _LOWEST) & (square < _HIGHEST)


# Triton compiles anew for an integer that is 1 or divisible by 16; these two change with the tensors of a step.
@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def sums_kernel(
    tensors, grads, chunk_places, numbers, partials, scalars, before, first_chunk: tl.int64, num_tensors: tl.int64,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, CORRECTED: tl.constexpr,
    ALIGNED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, NUM_SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write <m, g>, |m|^2, |g|^2 and the raw |g|^2 of each chunk to its row of `partials`, fp64.

    Spans whose fp32 products overflowed, vanished or are not finite are taken again in fp64.

    The first NUM_SCALARS rows of the scalar states are copied to `before` on the way, so that `step_kernels` may
    write the new ones in place while its other programs still need the old.
    """
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = first_chunk + tl.program_id(0)
    tensor, row, start, length = locate(tensors, chunk_places, chunk)
    pointers = (
        weight_pointers(row, start, DTYPE, CORRECTED, ALIGNED),
        pointer_to(tl.load(row + FIRST), start, MOMENT_DTYPE, ALIGNED),
        pointer_to(tl.load(grads + tensor), start, GRAD_DTYPE, ALIGNED),
    )
    coupled_decay = coupled_decay_of(row, numbers, COUPLED)
    zero = tl.zeros((), tl.float64)
    total_dot, total_momentum_sq, total_grad_sq, total_raw_sq = zero, zero, zero, zero
    for begin in range(0, length, _SPAN):
        end = tl.minimum(begin + _SPAN, length)
        dot, momentum_sq, grad_sq, raw_sq = _stretch_sums(
            pointers, begin, end, coupled_decay, COMPUTE, CORRECTED, COUPLED, MAXIMIZE, BLOCK
        )
        if COMPUTE != tl.float64:
            if not (_lossless(momentum_sq) & _lossless(grad_sq) & _lossless(raw_sq)):
                # Few lanes: the rare case must not cost the usual one its registers.
                dot, momentum_sq, grad_sq, raw_sq = _stretch_sums(
                    pointers, begin, end, coupled_decay, tl.float64, CORRECTED, COUPLED, MAXIMIZE, BLOCK // 8
                )
        total_dot += dot
        total_momentum_sq += momentum_sq
        total_grad_sq += grad_sq
        total_raw_sq += raw_sq
    store_sums(partials, chunk, (total_dot, total_momentum_sq, total_grad_sq, total_raw_sq))
    if NUM_SCALARS > 0:
        if start == 0:
            for scalar in tl.static_range(NUM_SCALARS):
                cell = scalar * num_tensors + tensor
                tl.store(before + cell, tl.load(scalars + cell))


@triton.jit
def store_sums(sums, row, totals):
    """Write the four sums to a row of `sums`."""
    for column in tl.static_range(4):
        tl.store(sums + row * 4 + column, totals[column])


@triton.jit
def tensor_sums(partials, row):
    """Add up a tensor's partial sums: the same numbers in the same order, whichever program asks."""
    chunks = tl.arange(0, _MAX_CHUNKS)
    own = chunks < tl.load(row + NUM_CHUNKS)
    cells = partials + (tl.load(row + FIRST_CHUNK) + chunks) * 4
    return (
        tl.sum(tl.load(cells, mask=own, other=0.0)),
        tl.sum(tl.load(cells + 1, mask=own, other=0.0)),
        tl.sum(tl.load(cells + 2, mask=own, other=0.0)),
        tl.sum(tl.load(cells + 3, mask=own, other=0.0)),
    )


@triton.jit
def combine_kernel(tensors, partials, sums):
    """Write the four sums of each tensor to its row of `sums`, fp64. One program a tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    store_sums(sums, tensor, tensor_sums(partials, row_of(tensors, tensor)))
