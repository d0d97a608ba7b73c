"""What a backend is handed, and gives back, that takes the whole step of a bucket by itself.

It can where no tensor waits for another or for another rank: scope "tensor", nothing sharded, no clipping, and
`nonfinite` "skip" or "propagate". Then a tensor is updated while the cache still holds what its sums have read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_tam.backends.entry import Entry
from hf_tam.update import Scalar


class AdamStep(NamedTuple):
    """The hyperparameters of an adaptive step.

    Attributes:
        lr: Learning rate: a float, or a 1-element tensor on the bucket's device, which is not read by the host.
        betas: Decays of the moments.
        eps: Term added to the denominator.
        weight_decay: Decoupled weight decay; 0 where it is coupled (then it is the entries').
        gamma: Smoothing of the torque.
        damping_eps: Least factor on a gradient.
        torque_steps: Steps in which the torque acts, None: all.
        literal: Whether the paper's recurrence is taken literally (`step_size="paper"`).
        skip_nonfinite: Whether a tensor with a NaN or Inf gradient is left out (`nonfinite="skip"`).
    """

    lr: Scalar
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    gamma: float
    damping_eps: float
    torque_steps: int | None
    literal: bool
    skip_nonfinite: bool


class SgdStep(NamedTuple):
    """The hyperparameters of a momentum step; see `AdamStep`."""

    lr: Scalar
    momentum: float
    gamma: float
    damping_eps: float
    torque_steps: int | None
    literal: bool
    skip_nonfinite: bool


class StepReport(NamedTuple):
    """What a step saw; fp64, on the device.

    Attributes:
        cosine: s_t, shape (n,).
        damping: The damping applied, shape (n,).
        sums: <m, g>, |m|^2, |g|^2 and the raw |g|^2, shape (n, 4).
        keep: False where the tensor was left out, shape (n,) bool; None where none was.
    """

    cosine: Tensor
    damping: Tensor
    sums: Tensor
    keep: Tensor | None


def no_whole_step(
    entries: Sequence[Entry], scalars: Tensor, step: AdamStep | SgdStep, *, skipped: Tensor
) -> StepReport | None:
    """The `Backend.whole_step` of a backend that takes every step in parts."""
    return None
