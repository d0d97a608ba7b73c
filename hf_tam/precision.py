"""How a weight is kept in bfloat16 and is an fp32 number all the same: what bfloat16 leaves out is a state of 16 bits.

The fp32 weight is the sum of two words, the parameter's bits moved up by 16 and the correction as a signed number:

    bits(weight) = bits(param) * 2^16 + correction,    -2^15 <= correction < 2^15

so the parameter is the weight rounded to nearest, and a tie goes away from zero. It cannot go to the even neighbour,
as torch rounds: an even bfloat16 would then stand for 65,537 weights, and 16 bits tell 65,536 apart. All NaN are one.

A correction is bits and no number. It is called bfloat16 all the same, for gloo and NCCL send no integers of 16 bits,
torch's load_state_dict casts states to the dtype of their parameter, and FSDP1 wants one dtype of a unit's states.

The kernels have dialects of `joined` and `split`, of the same names: native/numbers.h, triton/chunks.py.

Nothing in this module communicates.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 1 << 15


def joined(param: Tensor, correction: Tensor) -> Tensor:
    """The weights that a parameter and its correction are together.

    Args:
        param: bfloat16, any shape and strides.
        correction: bits called bfloat16, the same shape.

    Returns:
        A new fp32 tensor of that shape.
    """
    return ((param.view(torch.int16).to(torch.int32) << 16) + correction.view(torch.int16)).view(torch.float32)


def split(weights: Tensor, param: Tensor, correction: Tensor) -> None:
    """Write weights to a parameter and its correction, in place: `joined` gives them back, to the bit.

    Args:
        weights: fp32, any shape and strides.
        param: bfloat16, the same shape.
        correction: bits called bfloat16, the same shape.
    """
    bits = weights.view(torch.int32)
    nan = weights.isnan()
    # A NaN whose bits are all set would become a zero by what is carried.
    param.view(torch.int16).copy_(((bits + _HALF) >> 16).masked_fill_(nan, 0x7FC0))
    correction.view(torch.int16).copy_(bits.masked_fill(nan, 0))
