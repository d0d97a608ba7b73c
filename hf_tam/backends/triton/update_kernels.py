"""The update of parameters and moments: `hf_tam.update.adam_step` and `sgd_step` over all chunks in one launch."""

import triton
import triton.language as tl

from hf_tam.backends.triton.chunks import (
    FIRST,
    SECOND,
    coupled_decay_of,
    effective_grad,
    load_block,
    load_weight,
    locate,
    pointer_to,
    store_block,
    store_weight,
    weight_pointers,
)


@triton.jit
def _adam_block(
    pointers, index, length, clip, coupled_decay, coefficients,
    COMPUTE: tl.constexpr, CORRECTED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    CLIPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    decay, first_weight, second_decay, second_weight, step_size, eps = coefficients
    param = load_weight(pointers[0], index, length, COMPUTE, CORRECTED, MASKED)
    first = load_block(pointers[1], index, length, COMPUTE, MASKED)
    second = load_block(pointers[2], index, length, COMPUTE, MASKED)
    raw = load_block(pointers[3], index, length, COMPUTE, MASKED)
    if CLIPPED:
        raw = raw * clip
    grad = effective_grad(raw, param, coupled_decay, COUPLED, MAXIMIZE)
    # As torch.lerp: from the nearer end, so that a weight of 1 leaves nothing of the old value.
    way = grad - first
    first = tl.where(first_weight < 0.5, first + first_weight * way, grad - way * (1.0 - first_weight))
    second = second * second_decay + grad * second_weight * grad
    if COMPUTE == tl.float64:
        update = first / (tl.sqrt(second) + eps)
    else:
        update = tl.div_rn(first, tl.sqrt_rn(second) + eps)  # `/` and `sqrt` are approximations in fp32
    store_weight(pointers[0], index, length, param * decay - update * step_size, CORRECTED, MASKED)
    store_block(pointers[1], index, length, first, MASKED)
    store_block(pointers[2], index, length, second, MASKED)


@triton.jit
def _sgd_block(
    pointers, index, length, clip, coupled_decay, coefficients,
    COMPUTE: tl.constexpr, CORRECTED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    CLIPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    momentum, gain, step_size = coefficients
    param = load_weight(pointers[0], index, length, COMPUTE, CORRECTED, MASKED)
    first = load_block(pointers[1], index, length, COMPUTE, MASKED)
    raw = load_block(pointers[3], index, length, COMPUTE, MASKED)
    if CLIPPED:
        raw = raw * clip
    first = first * momentum + effective_grad(raw, param, coupled_decay, COUPLED, MAXIMIZE) * gain
    store_weight(pointers[0], index, length, param - first * step_size, CORRECTED, MASKED)
    store_block(pointers[1], index, length, first, MASKED)


@triton.jit
def update_chunk(
    row, grad_address, start, length, clip, coupled_decay, coefficients,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, CORRECTED: tl.constexpr,
    ALIGNED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, ADAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one chunk, last block first: what the sums have read last is the likeliest to be still in the cache.

    `clip` points to a factor on the gradient or is None; `coefficients` are the fields of AdamCoefficients or
    SgdCoefficients, in order.
    """
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    pointers = (
        weight_pointers(row, start, DTYPE, CORRECTED, ALIGNED),
        pointer_to(tl.load(row + FIRST), start, MOMENT_DTYPE, ALIGNED),
        pointer_to(tl.load(row + SECOND), start, MOMENT_DTYPE, ALIGNED),
        pointer_to(grad_address, start, GRAD_DTYPE, ALIGNED),
    )
    decay = tl.cast(coupled_decay, COMPUTE)
    CLIPPED: tl.constexpr = clip is not None
    factor = decay  # unused
    if CLIPPED:
        factor = tl.load(clip).to(COMPUTE)
    lanes = tl.arange(0, BLOCK)
    whole = length // BLOCK * BLOCK
    if whole < length:
        if ADAM:
            _adam_block(
                pointers, whole + lanes, length, factor, decay, coefficients, COMPUTE, CORRECTED, COUPLED, MAXIMIZE,
                CLIPPED, True,
            )  # fmt: skip
        else:
            _sgd_block(
                pointers, whole + lanes, length, factor, decay, coefficients, COMPUTE, CORRECTED, COUPLED, MAXIMIZE,
                CLIPPED, True,
            )  # fmt: skip
    for done in range(BLOCK, whole + BLOCK, BLOCK):
        index = whole - done + lanes
        if ADAM:
            _adam_block(
                pointers, index, length, factor, decay, coefficients, COMPUTE, CORRECTED, COUPLED, MAXIMIZE, CLIPPED,
                False,
            )  # fmt: skip
        else:
            _sgd_block(
                pointers, index, length, factor, decay, coefficients, COMPUTE, CORRECTED, COUPLED, MAXIMIZE, CLIPPED,
                False,
            )  # fmt: skip


@triton.jit
def _coefficients(own, num_tensors, COMPUTE: tl.constexpr, ADAM: tl.constexpr):
    """A tensor's column of the coefficients."""
    first, second = tl.load(own).to(COMPUTE), tl.load(own + num_tensors).to(COMPUTE)
    third = tl.load(own + 2 * num_tensors).to(COMPUTE)
    if ADAM:
        fourth = tl.load(own + 3 * num_tensors).to(COMPUTE)
        fifth, sixth = tl.load(own + 4 * num_tensors).to(COMPUTE), tl.load(own + 5 * num_tensors).to(COMPUTE)
        return first, second, third, fourth, fifth, sixth
    else:
        return first, second, third


@triton.jit(do_not_specialize=["first_chunk", "num_tensors"])
def update_kernel(
    tensors, grads, chunk_places, numbers, coefficients, keep, clip, first_chunk: tl.int64, num_tensors: tl.int64,
    DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, CORRECTED: tl.constexpr,
    ALIGNED: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, ADAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update by coefficients that are known: one a row of `coefficients` (fp64), a column for each tensor.

    A tensor whose `keep` is False is not even read. `clip` points to a factor on all gradients (fp64), or is None.
    """
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    chunk = first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, row, start, length = locate(tensors, chunk_places, chunk)
    if keep is not None:
        length = tl.where(tl.load(keep + tensor), length, 0)
    weights = _coefficients(coefficients + tensor, num_tensors, COMPUTE, ADAM)
    update_chunk(
        row, tl.load(grads + tensor), start, length, clip, coupled_decay_of(row, numbers, COUPLED), weights,
        DTYPE, GRAD_DTYPE, MOMENT_DTYPE, CORRECTED, ALIGNED, COUPLED, MAXIMIZE, ADAM, BLOCK,
    )  # fmt: skip
