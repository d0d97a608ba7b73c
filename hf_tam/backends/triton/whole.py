"""The whole step of a bucket in two launches, and nothing else; see `backends.whole`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends.triton.chunks import UPDATE_BLOCK
from hf_tam.backends.triton.launch import Bound, compiled_for, new_partials, on, sum_chunks
from hf_tam.backends.triton.step_kernels import REPORTS, adam_step_kernel, sgd_step_kernel
from hf_tam.backends.whole import AdamStep, SgdStep, StepReport


def whole_adam(bound: Bound, scalars: Tensor, step: AdamStep, *, skipped: Tensor) -> StepReport:
    """Take the adaptive step of every entry: changes parameters, moments and scalar states in place.

    Two launches for each kind of tensors: the sums, then the rest. No communication, and nothing is read by the host.

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
    return _run(adam_step_kernel, bound, scalars, step, numbers, skipped)


def whole_sgd(bound: Bound, scalars: Tensor, step: SgdStep, *, skipped: Tensor) -> StepReport:
    """Take the momentum step of every entry; as `whole_adam`, with the rows step and torque, shape (2, n)."""
    return _run(sgd_step_kernel, bound, scalars, step, {"momentum": step.momentum}, skipped)


def _log(beta: float) -> float:
    """log(beta); for 0 a number whose exponential is 0 too."""
    return math.log(beta) if beta > 0.0 else -1e4


def _run(
    kernel: Any, bound: Bound, scalars: Tensor, step: AdamStep | SgdStep, numbers: dict[str, float], skipped: Tensor
) -> StepReport:
    table, count = bound.table, len(bound.entries)
    device = scalars.device
    reports = torch.empty(count, REPORTS, dtype=torch.float64, device=device)
    keeps = torch.empty(count, dtype=torch.uint8, device=device) if step.skip_nonfinite else None
    partials, before = new_partials(table), torch.empty_like(scalars)
    on_device = isinstance(step.lr, Tensor)
    numbers = {
        **numbers, "gamma": step.gamma, "damping_eps": step.damping_eps, "lr": 0.0 if on_device else float(step.lr),
        "torque_steps": math.inf if step.torque_steps is None else step.torque_steps,
    }  # fmt: skip
    with on(device):
        for kind, chunks in table.parts.items():
            sum_chunks(table, kind, chunks, partials, scalars, before)
            kernel[(chunks.size,)](
                table.tensors, table.grads, table.owners, partials, scalars, before, reports, keeps, skipped,
                step.lr if on_device else None, chunks.first, count, coupled_decay=kind.coupled_decay,
                LITERAL=step.literal, SKIP=step.skip_nonfinite,
                **{name: float(number) for name, number in numbers.items()},
                **compiled_for(kind, block=UPDATE_BLOCK),
            )  # fmt: skip
    increment_version([entry.param for entry in bound.entries])
    keep = None if keeps is None else keeps.view(torch.bool)
    return StepReport(reports[:, 4], reports[:, 5], reports[:, :4], keep)
