"""How a step is executed. Every backend computes the same step; they differ in how many passes and launches it takes.

| module | sums | update | chosen |
|---|---|---|---|
| `single` | one tensor at a time, fp64 | one tensor at a time, plain torch operations | `foreach=False, fused=False` |
| `foreach` | as `single` | `torch._foreach_*` | `foreach=True`, and by default on accelerators |
| `cpu` | chunks that stay in cache | torch's vectorised fused kernels | `fused=True`, and by default on the CPU |

A backend is a module with the functions of the `Backend` protocol. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.update import Scalar

__all__ = ["NUM_SUMS", "Backend", "Entry", "Scalar", "StepScalars", "select_backend"]

NUM_SUMS = 4
"""Columns of the partial sums: <m, g>, |m|^2, |g|^2 and the raw |g|^2."""


class Backend(Protocol):
    """What the optimizers need of a backend."""

    def partial_sums(self, entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
        """The rows <m, g>, |m|^2, |g|^2 and raw |g|^2 of each entry.

        Returns:
            Shape (len(entries), 4), `accumulator_dtype`. Where `with_dot` is False the first two columns are 0.
        """

    def adam(self, entries: Sequence[Entry], scalars: StepScalars) -> None:
        """`update.adam_step` for every entry."""

    def sgd(self, entries: Sequence[Entry], scalars: StepScalars) -> None:
        """`update.sgd_step` for every entry."""


def select_backend(device: torch.device, *, foreach: bool | None, fused: bool | None, on_host: bool) -> Backend:
    """The backend for the tensors on `device`.

    Args:
        device: Where the parameters are.
        foreach: The constructor's argument; None leaves the choice to us.
        fused: The constructor's argument; None leaves the choice to us.
        on_host: Whether the step's scalars may be Python numbers (the CPU, without `capturable`).

    Raises:
        RuntimeError: `fused=True` where no fused kernel is at hand.
    """
    from hf_tam.backends import cpu, single
    from hf_tam.backends import foreach as multi_tensor

    if fused and not on_host:
        where = "capturable=True" if device.type == "cpu" else f"the device {device}"
        raise RuntimeError(
            f"`fused=True` has no kernel for {where} in this version of hf_tam; leave fused=None (foreach is used)"
        )
    if fused or (fused is None and foreach is None and on_host):
        return cpu
    if foreach or (foreach is None and fused is None):
        return multi_tensor
    return single
