"""What the last step saw, kept as tensors on their device until somebody reads a number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.bucket import Bucket


class _Record(NamedTuple):
    """The last step of one bucket: positions in param_groups order, and vectors of their length."""

    indices: list[int]
    cosine: Tensor
    damping: Tensor
    raw_grad_sq: Tensor


class Telemetry:
    """Statistics of the last step, and the count of skipped updates."""

    def __init__(self) -> None:
        """Start with no step taken."""
        self._records: list[_Record] = []
        self._skipped: dict[torch.device, Tensor] = {}
        self._warned = False

    def start(self) -> None:
        """A new step begins: forget the last one."""
        self._records = []

    def record(self, buckets: Sequence[Bucket]) -> None:
        """Keep what the buckets of one step saw."""
        for bucket in buckets:
            indices = [entry.index for entry in bucket.entries]
            raw = bucket.raw_grad_sq if bucket.measured else torch.full_like(bucket.raw_grad_sq, torch.nan)
            self._records.append(_Record(indices, bucket.cosine, bucket.damping, raw))

    def stats(
        self, torques: Sequence[Tensor | None], *, names: list[str | None], device: torch.device
    ) -> dict[str, Any]:
        """See `TorqueAware.torque_stats`.

        Args:
            torques: The torque state of every parameter, None where there is none yet.
            names: The parameters' names.
            device: Where the results go.
        """
        zero = torch.zeros((), dtype=torch.float32, device=device)
        held = [zero if value is None else value.to(device) for value in torques]
        torque = torch.stack(held) if held else zero.new_zeros(0)
        cosines, dampings = [zero] * len(torques), list(update.damping(torque).unbind())
        total_sq = torch.zeros((), dtype=update.accumulator_dtype(device), device=device)
        for record in self._records:
            columns = (record.cosine.to(device, torch.float32), record.damping.to(device, torch.float32))
            for index, cosine, damping in zip(record.indices, *(column.unbind() for column in columns), strict=True):
                cosines[index], dampings[index] = cosine, damping
            total_sq = total_sq + record.raw_grad_sq.to(device).sum()
        grad_norm = total_sq.sqrt() if self._records else torch.full_like(total_sq, torch.nan)
        skipped = torch.zeros((), dtype=torch.int64, device=device)
        for count in self._skipped.values():
            skipped = skipped + count.to(device)
        return {
            "names": names,
            "cosine": torch.stack(cosines) if cosines else torque.clone(),
            "torque": torque,
            "damping": torch.stack(dampings) if dampings else torque.clone(),
            "grad_norm": grad_norm.to(torch.float32),
            "skipped": skipped,
        }

    def count_skipped(self, kept: Tensor, *, on_host: bool) -> None:
        """Count the False entries of `kept`; where the host may look, warn of the first."""
        if kept.device not in self._skipped:
            self._skipped[kept.device] = torch.zeros((), dtype=torch.int64, device=kept.device)
        # In place: a replayed CUDA graph goes on adding to the same memory.
        self._skipped[kept.device].add_((~kept).sum())
        if on_host:
            self.read_skipped()

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
