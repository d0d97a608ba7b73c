"""What the last step saw, kept as tensors on their device until somebody reads a number."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.sharding import Reducer
from hf_tam.step.batch import Batch, beside_each_other
from hf_tam.update import Numbers

_PATIENCE = 2
"""Steps without any gradient before that is said. Some call step() once before they begin, to satisfy a scheduler."""


class Record(NamedTuple):
    """The last step of one batch, vectors with an entry a tensor.

    Attributes:
        indices: The positions of the tensors in param_groups order.
        cosine: See `Batch`, like the next three.
        damping: The damping applied.
        factor: The factor on the gradient, or None where the backend does not say.
        keep: Where the step was taken, or None where it was everywhere.
        raw_grad_sq: |g|^2 as the backward pass left it, or None where it was not taken.
        numbers: The hyperparameters of each param group.
        groups: The place in `numbers` of each tensor.
    """

    indices: list[int]
    cosine: Tensor
    damping: Tensor
    factor: Tensor | None
    keep: Tensor | None
    raw_grad_sq: Tensor | None
    numbers: list[Numbers]
    groups: list[int]

    def effective_lr(self) -> Tensor:
        """What the learning rate amounts to beside AdamW's or SGD's, shape (n,); NaN where the step was skipped.

        2 lr c_t in the calibrated forms, in which c = 1/2 is neutral; lr c_t in the paper's.
        """
        numbers = beside_each_other(self.numbers, self.groups, device=self.damping.device, kept={})
        factor = self.damping + numbers.damping_eps if self.factor is None else self.factor
        effective = numbers.lr * (factor / numbers.neutral)
        return effective if self.keep is None else torch.where(self.keep, effective, torch.nan)

    def squares(self) -> Tensor:
        """|g|^2, shape (n,); NaN where nothing needed it."""
        return torch.full_like(self.damping, torch.nan) if self.raw_grad_sq is None else self.raw_grad_sq


class _Counts(dict[torch.device, Tensor]):
    """The count of skipped updates on each device, to be added to: int64, shape ()."""

    def __missing__(self, device: torch.device) -> Tensor:
        """Begin to count."""
        return self.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))


class Telemetry:
    """Statistics of the last step, and the count of skipped updates.

    Attributes:
        records: The last step, by the reducer of each call that it was taken in.
        skipped: How many updates were left out so far. In place: a replayed CUDA graph goes on adding to it.
        promised: The tensor that is to be filled with the norm of the next step's gradients, see `promise`.
        is_idle: Whether no step has seen a gradient yet, and nobody was told.
    """

    def __init__(self) -> None:
        """Start with no step taken."""
        self.records: dict[Reducer, list[Record]] = {}
        self.skipped: dict[torch.device, Tensor] = _Counts()
        self.promised: Tensor | None = None
        self.is_idle = True
        self._warned = False
        self._steps_without_gradient = 0

    def promise(self, device: torch.device) -> Tensor:
        """See `TorqueAware.promise_grad_norm`. Only the tensor that was promised last is filled."""
        self.promised = torch.full((), torch.nan, dtype=torch.float32, device=device)
        return self.promised

    def keep_promise(self, is_off: Tensor | None) -> None:
        """Fill the promised tensor; not where the step was called off, shape ()."""
        if self.promised is not None:
            norm = self._grad_norm(self.promised.device)
            if is_off is not None:
                norm = torch.where(is_off.to(norm.device), torch.nan, norm)
            self.promised.copy_(norm)
            self.promised = None

    def forget(self) -> None:
        """Forget the last step."""
        self.records.clear()

    def warn(self, batches: Sequence[Batch]) -> None:
        """At the end of a step, when nothing is left to be changed: say what the user should know, once."""
        if batches:
            self.is_idle = False
            if all(batch.options.on_host for batch in batches):
                self.read_skipped()
        elif self.is_idle:
            # Before the first gradient only: later on steps without any are usual (a critic that rests, accumulation
            # that skips).
            self._steps_without_gradient += 1
            if self._steps_without_gradient == _PATIENCE:
                self.is_idle = False
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
        records = [record for records in self.records.values() for record in records]
        for record in records:
            total_sq = total_sq + record.squares().to(device).sum()
        return total_sq.sqrt() if records else torch.full_like(total_sq, torch.nan)

    def stats(
        self,
        torques: Iterable[tuple[Sequence[int], Tensor]],
        *,
        names: list[str | None],
        device: torch.device,
        moved: Mapping[int, int] | None = None,
    ) -> dict[str, Any]:
        """See `TorqueAware.torque_stats`.

        Args:
            torques: The torque states that there are, 1-D, with the positions of their logical tensors.
            names: The names of all logical tensors.
            device: Where the results go.
            moved: Where a tensor stands now, by its position in the last step, if groups have changed since.
        """
        nothing = torch.zeros(len(names), dtype=torch.float32, device=device)
        torque = _replaced(nothing, torques)
        records = [record for records in self.records.values() for record in records]
        if moved is not None:
            now = [[moved.get(index, -1) for index in record.indices] for record in records]
            records = [record._replace(indices=places) for record, places in zip(records, now, strict=True)]
        cosine = _replaced(nothing, ((record.indices, record.cosine) for record in records))
        damping = _replaced(update.damping(torque), ((record.indices, record.damping) for record in records))
        unknown = torch.full_like(nothing, torch.nan)
        rates = _replaced(unknown, ((record.indices, record.effective_lr()) for record in records))
        norms = _replaced(unknown, ((record.indices, record.squares().sqrt()) for record in records))
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        for count in self.skipped.values():
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
        self.skipped[skipped.device].add_(skipped.sum())

    def read_skipped(self) -> int:
        """How many updates were skipped so far; warns once. Waits for an accelerator."""
        # A fake tensor (FakeTensorMode) has counted nothing.
        total = sum(int(count) for count in self.skipped.values() if type(count) is Tensor)
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
            if index >= 0:  # it has left the param groups
                columns[index] = value
    return torch.stack(columns) if columns else values.clone()
