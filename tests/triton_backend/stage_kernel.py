"""A kernel that is the scalar stage alone, from numbers to numbers."""

import triton
import triton.language as tl

from hf_tam.backends.triton.scalar_stage import learning_rate, scalar_stage_adam, scalar_stage_sgd


@triton.jit
def stage_kernel(before, numbers, out, ADAM: tl.constexpr):
    """`before` has the three sums and the states; `out` takes the states, cosine, damping and the coefficients."""
    sums = (tl.load(before), tl.load(before + 1), tl.load(before + 2))
    lr = learning_rate(numbers, None, 0)
    if ADAM:
        step, scale, torque, cosine, damping, row = scalar_stage_adam(
            sums, tl.load(before + 3), tl.load(before + 4), tl.load(before + 5), lr, numbers
        )
        found = (step, scale, torque, cosine, damping, row[0], row[1], row[2], row[3], row[4], row[5])
        for place in tl.static_range(11):
            tl.store(out + place, found[place])
    else:
        step, torque, cosine, damping, row = scalar_stage_sgd(
            sums, tl.load(before + 3), tl.load(before + 4), lr, numbers
        )
        found = (step, torque, cosine, damping, row[0], row[1], row[2])
        for place in tl.static_range(7):
            tl.store(out + place, found[place])
