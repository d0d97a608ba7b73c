"""What the last step saw, kept as tensors on their device until somebody reads a number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.sharding import Reducer
from hf_tam.step.batch import Batch

_PATIENCE = 2
"""Steps without any gradient before that is said. Some call step() once before they begin, to satisfy a scheduler."""


class _Record(NamedTuple):
    """The last step of one batch: positions in param_groups order, and vectors of their length."""

    indices: list[int]
    cosine: Tensor
    damping: Tensor
    effective_lr: Callable[[], Tensor]
    raw_grad_sq: Tensor


class Telemetry:
    """Statistics of the last step, and the count of skipped updates."""

    def __init__(self) -> None:
        """Start with no step taken."""
        self._records: dict[Reducer, list[_Record]] = {}
        self._skipped: dict[torch.device, Tensor] = {}
        self._warned = False
        self._promised: Tensor | None = None
        self._steps_without_gradient = 0  # from the first one on; -1 when there was one, or it was said

    def promise(self, device: torch.device) -> Tensor:
        """See `TorqueAware.promise_grad_norm`. Only the tensor that was promised last is filled."""
        self._promised = torch.full((), torch.nan, dtype=torch.float32, device=device)
        return self._promised

    def forget(self) -> None:
        """Forget the last step."""
        self._records.clear()

    def record(self, reducer: Reducer, batches: Sequence[Batch]) -> None:
        """Keep what the batches of one call saw, in the place of the last step.

        DeepSpeed takes a step in several calls, each with its own reducer.
        """
        if reducer.sees_all:
            self._records.clear()
        self._records[reducer] = []
        for batch in batches:
            raw = batch.raw_grad_sq if batch.measured else torch.full_like(batch.raw_grad_sq, torch.nan)
            rates = batch.effective_learning_rates()
            self._records[reducer].append(_Record(batch.indices, batch.cosine, batch.damping, rates, raw))
        if self._promised is not None:
            norm = self._grad_norm(self._promised.device)
            for batch in batches[:1]:
                if batch.is_off is not None:  # such a step is not taken
                    norm = torch.where(batch.is_off.to(norm.device), torch.nan, norm)
            self._promised.copy_(norm)
            self._promised = None

    def warn(self, batches: Sequence[Batch]) -> None:
        """At the end of a step, when nothing is left to be changed: say what the user should know, once."""
        if batches:
            self._steps_without_gradient = -1
            if all(batch.on_host for batch in batches):
                self.read_skipped()
        elif self._steps_without_gradient >= 0:
            self._steps_without_gradient += 1
            if self._steps_without_gradient == _PATIENCE:
                self._steps_without_gradient = -1
                warnings.warn(
                    f"in {_PATIENCE} steps none of the optimizer's parameters has had a gradient: nothing is trained. "
                    "Were the model's parameters frozen, or replaced after the optimizer was built (fully_shard, "
                    "load_state_dict(assign=True), FSDP1)? Build the optimizer after that, with the parameters that "
                    "the model has then",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _grad_norm(self, device: torch.device) -> Tensor:
        """The norm over all records of the last step, 0-d; NaN where there is none."""
        total_sq = torch.zeros((), dtype=update.accumulator_dtype(device), device=device)
        records = [record for records in self._records.values() for record in records]
        for record in records:
            total_sq = total_sq + record.raw_grad_sq.to(device).sum()
        return total_sq.sqrt() if records else torch.full_like(total_sq, torch.nan)

    def stats(
        self, torques: Iterable[tuple[Sequence[int], Tensor]], *, names: list[str | None], device: torch.device
    ) -> dict[str, Any]:
        """See `TorqueAware.torque_stats`.

        Args:
            torques: The torque states that there are, 1-D, with the positions of their logical tensors.
            names: The names of all logical tensors.
            device: Where the results go.
        """
        nothing = torch.zeros(len(names), dtype=torch.float32, device=device)
        torque = _replaced(nothing, torques)
        records = [record for records in self._records.values() for record in records]
        cosine = _replaced(nothing, ((record.indices, record.cosine) for record in records))
        damping = _replaced(update.damping(torque), ((record.indices, record.damping) for record in records))
        unknown = torch.full_like(nothing, torch.nan)
        rates = _replaced(unknown, ((record.indices, record.effective_lr()) for record in records))
        norms = _replaced(unknown, ((record.indices, record.raw_grad_sq.sqrt()) for record in records))
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        for count in self._skipped.values():
            skipped = skipped + count.to(device)
        return {
            "names": names,
            "cosine": cosine,
            "torque": torque,
            "damping": damping,
            "effective_lr": rates,
            "grad_norms": norms,
            "grad_norm": self._grad_norm(device).to(torch.float32),
            "skipped": skipped,
        }

    def count_skipped(self, skipped: Tensor) -> None:
        """Count the True entries of `skipped`."""
        # In place: a replayed CUDA graph goes on adding to the same memory.
        self.skipped_on(skipped.device).add_(skipped.sum())

    def skipped_on(self, device: torch.device) -> Tensor:
        """The count on one device, to be added to: int64, shape ()."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def read_skipped(self) -> int:
        """How many updates were skipped so far; warns once. Waits for an accelerator."""
        total = sum(int(count) for count in self._skipped.values())
        if total and not self._warned:
            self._warned = True
            warnings.warn(
                f"{total} update(s) were skipped because a gradient was NaN or Inf; their parameters and state were "
                "left as they were (nonfinite='skip'). optimizer.torque_stats()['skipped'] counts them.",
                RuntimeWarning,
                stacklevel=2,
            )
        return total


def _replaced(values: Tensor, parts: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
    """A copy of the 1-D `values` with those at the given positions replaced. Indexing would wait for the device."""
    columns = list(values.unbind())
    for indices, part in parts:
        for index, value in zip(indices, part.to(values.device, values.dtype).unbind(), strict=True):
            columns[index] = value
    return torch.stack(columns) if columns else values.clone()
