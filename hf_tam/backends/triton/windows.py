"""The whole step of a bucket, window by window: two launches for each, and nothing else.

For steps in which no tensor depends on another or on another rank: scope "tensor", nothing sharded, no clipping, and
`nonfinite` "skip" or "propagate".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends.triton.chunks import UPDATE_BLOCK
from hf_tam.backends.triton.launch import Bound, compiled_for, new_partials, on, sum_chunks
from hf_tam.backends.triton.window_kernels import adam_window_kernel, sgd_window_kernel
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


class WindowReport(NamedTuple):
    """What a step saw; fp64, on the device.

    Attributes:
        cosine: s_t, shape (n,).
        damping: The damping applied, shape (n,).
        sums: <m, g>, |m|^2, |g|^2 and the raw |g|^2, shape (n, 4).
    """

    cosine: Tensor
    damping: Tensor
    sums: Tensor


def adam_windows(bound: Bound, scalars: Tensor, step: AdamStep, *, skipped: Tensor) -> WindowReport:
    """Take the adaptive step of every entry: changes parameters, moments and scalar states in place.

    A window is a run of tensors whose first moments and gradients fill at most half of the L2 cache, or one larger
    tensor. No communication, and nothing is read by the host.

    Args:
        bound: What `bind` made of the bucket's n entries; none of them may be `outside`.
        scalars: Rows step, exp_avg_scale and torque, a column an entry: fp32, shape (3, n), contiguous.
        step: The hyperparameters.
        skipped: 0-d int64; the number of tensors left out is added to it.
    """
    beta1, beta2 = step.betas
    numbers = {
        "beta1": beta1, "log_beta1": _log(beta1), "beta2": beta2, "log_beta2": _log(beta2), "eps": step.eps,
        "weight_decay": step.weight_decay,
    }  # fmt: skip
    return _run(adam_window_kernel, bound, scalars, step, numbers, skipped)


def sgd_windows(bound: Bound, scalars: Tensor, step: SgdStep, *, skipped: Tensor) -> WindowReport:
    """Take the momentum step of every entry; as `adam_windows`, with the rows step and torque, shape (2, n)."""
    return _run(sgd_window_kernel, bound, scalars, step, {"momentum": step.momentum}, skipped)


def _log(beta: float) -> float:
    """log(beta); for 0 a number whose exponential is 0 too."""
    return math.log(beta) if beta > 0.0 else -1e4


def _run(
    kernel: Any, bound: Bound, scalars: Tensor, step: AdamStep | SgdStep, numbers: dict[str, float], skipped: Tensor
) -> WindowReport:
    table, count = bound.table, len(bound.entries)
    device = scalars.device
    cosine, damping, sums = (
        torch.empty(shape, dtype=torch.float64, device=device) for shape in ((count,), (count,), (count, 4))
    )
    partials, before = new_partials(table), torch.empty_like(scalars)
    on_device = isinstance(step.lr, Tensor)
    numbers = {
        **numbers, "gamma": step.gamma, "damping_eps": step.damping_eps, "lr": 0.0 if on_device else float(step.lr),
        "torque_steps": math.inf if step.torque_steps is None else step.torque_steps,
    }  # fmt: skip
    with on(device):
        for kind, chunks in table.windows:
            sum_chunks(table, kind, chunks, partials, scalars, before)
            kernel[(chunks.size,)](
                table.tensors, table.grads, table.owners, partials, scalars, before, sums, cosine, damping, skipped,
                step.lr if on_device else None, chunks.first, count, coupled_decay=kind.coupled_decay,
                LITERAL=step.literal, SKIP=step.skip_nonfinite,
                **{name: float(number) for name, number in numbers.items()},
                **compiled_for(kind, block=UPDATE_BLOCK),
            )  # fmt: skip
    increment_version([entry.param for entry in bound.entries])
    return WindowReport(cosine, damping, sums)
