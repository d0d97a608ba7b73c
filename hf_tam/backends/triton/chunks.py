"""What all kernels share: how a program finds its chunk, and how a block of it is read and written.

A launch is a grid of chunks. A chunk is a stretch of one tensor; `chunk_places` says which tensor's, and the tensor's
row in `tensors` (columns below) says where it lies and how long its chunks are. So neither the number of tensors nor
their sizes are part of the compiled code. Offsets into a tensor are 64 bits wide, those within a chunk 32.

Why the sizes are what they are (the work is bound by memory, at one or two operations a byte):

* A thread moves 16 bytes by one instruction, the most there is: 4 fp32 or 8 bf16 elements. 4 warps of 32 threads with
  8 elements each are 1024, the least block that is whole numbers of both: `UPDATE_BLOCK`, whose seven streams take 68
  to 80 registers a thread (ptxas, sm_80). The sums read two streams and take twice as many elements at a time
  (`SUMS_BLOCK`, 124 registers), so that as many bytes are under way.
* 4 warps a program, so that several programs share a multiprocessor, and one loads while another computes.
* The last block of a chunk is masked and the others are not: under a mask that may end anywhere the compiler would
  load one element at a time.

Triton passes a Python float as fp32, in which 1 - 0.999 is off by 1e-5: numbers are declared `tl.float64`.
"""

# No `from __future__ import annotations` beside kernels: Triton reads annotations as objects.
import triton
import triton.language as tl

from hf_tam.update import Numbers

SUMS_BLOCK = 2048
UPDATE_BLOCK = 1024
NUM_WARPS = 4
SPAN = 8192
"""Elements summed in fp32: 4 in each of `SUMS_BLOCK` lanes, then a tree of 11 levels, so off by at most 15 * 2^-24
(9e-7) of the sum of the terms' absolute values. What is beyond is added in fp64. A chunk is a multiple of it."""
MAX_CHUNKS = 512
"""Chunks of one tensor at most: every program of `step_kernels` adds up all of its tensor's partial sums."""
FIELDS = 9
"""Columns of `tensors`."""

_FIELDS = tl.constexpr(FIELDS)
_NUM_NUMBERS = tl.constexpr(len(Numbers._fields))
_COUPLED_DECAY = tl.constexpr(Numbers._fields.index("coupled_decay"))
PARAM, FIRST, SECOND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # addresses
NUMEL, LENGTH = tl.constexpr(3), tl.constexpr(4)  # of the tensor, of its chunks
FIRST_CHUNK, NUM_CHUNKS = tl.constexpr(5), tl.constexpr(6)
GROUP = tl.constexpr(7)  # the row of `numbers` that holds for the tensor
CORRECTION = tl.constexpr(8)  # the address of what a parameter leaves out of its weight, or 0


@triton.jit
def row_of(tensors, tensor):
    """The tensor's row of the table."""
    return tensors + tensor * _FIELDS


@triton.jit
def locate(tensors, chunk_places, chunk):
    """The chunk's tensor, that tensor's row, and the first element and the number of elements of the chunk."""
    tensor = tl.load(chunk_places + chunk).to(tl.int64)
    row = row_of(tensors, tensor)
    length = tl.load(row + LENGTH)
    start = (chunk - tl.load(row + FIRST_CHUNK)) * length
    return tensor, row, start, tl.minimum(length, tl.load(row + NUMEL) - start).to(tl.int32)


@triton.jit
def coupled_decay_of(row, numbers, COUPLED: tl.constexpr):
    """How many times the parameter belong to the tensor's gradient."""
    decay = tl.full((), 0.0, tl.float64)
    if COUPLED:
        decay = tl.load(numbers_of(row, numbers) + _COUPLED_DECAY)
    return decay


@triton.jit
def numbers_of(row, numbers):
    """The hyperparameters of the tensor: the fields of `hf_tam.update.Numbers`, fp64."""
    return numbers + tl.load(row + GROUP) * _NUM_NUMBERS


@triton.jit
def pointer_to(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Points at element `start`, a multiple of every block, of the tensor at `address`."""
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_block(pointer, index, length, COMPUTE: tl.constexpr, MASKED: tl.constexpr):
    """The elements at `index`, as COMPUTE; 0 from `length` on."""
    if MASKED:
        values = tl.load(pointer + index, mask=index < length, other=0.0)
    else:
        values = tl.load(pointer + index)
    if pointer.dtype.element_ty == tl.bfloat16:
        values = values.to(tl.float32)  # exact; Triton 3.9's interpreter reads bits as a number on the way to fp64
    return values.to(COMPUTE)


@triton.jit
def store_block(pointer, index, length, values, MASKED: tl.constexpr):
    """Round once, to the dtype of what is pointed at."""
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + index, values, mask=index < length)
    else:
        tl.store(pointer + index, values)


@triton.jit
def weight_pointers(row, start, DTYPE: tl.constexpr, CORRECTED: tl.constexpr, ALIGNED: tl.constexpr):
    """Point at element `start` of the tensor's parameter and of its correction; twice at the one that has none."""
    if CORRECTED:
        param = pointer_to(tl.load(row + PARAM), start, tl.int16, ALIGNED)
        return param, pointer_to(tl.load(row + CORRECTION), start, tl.int16, ALIGNED)
    else:
        param = pointer_to(tl.load(row + PARAM), start, DTYPE, ALIGNED)
        return param, param


@triton.jit
def load_weight(pointers, index, length, COMPUTE: tl.constexpr, CORRECTED: tl.constexpr, MASKED: tl.constexpr):
    """The weights at `index`, as COMPUTE; with a correction `hf_tam.precision.joined`."""
    if CORRECTED:
        high = load_block(pointers[0], index, length, tl.int32, MASKED)
        bits = (high << 16) + load_block(pointers[1], index, length, tl.int32, MASKED)
        return bits.to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return load_block(pointers[0], index, length, COMPUTE, MASKED)


@triton.jit
def store_weight(pointers, index, length, values, CORRECTED: tl.constexpr, MASKED: tl.constexpr):
    """Store the weights at `index`; with a correction `hf_tam.precision.split`."""
    if CORRECTED:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        is_nan = values != values
        high = tl.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16)
        store_block(pointers[0], index, length, high, MASKED)
        store_block(pointers[1], index, length, tl.where(is_nan, 0, bits), MASKED)
    else:
        store_block(pointers[0], index, length, values, MASKED)


@triton.jit
def effective_grad(raw, param, coupled_decay, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr):
    """The gradient that the angle and the moments see: sign turned, coupled weight decay added."""
    grad = raw
    if MAXIMIZE:
        grad = -raw
    if COUPLED:
        grad += tl.where(coupled_decay == 0.0, 0.0, coupled_decay * param)  # 0 * Inf would be NaN
    return grad
