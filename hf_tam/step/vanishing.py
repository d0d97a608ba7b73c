"""Whether bfloat16 parameters move at all: looked at once, in the first step that has a learning rate.

A bfloat16 number has 8 bits, so a step of less than 1/512 of a weight is nothing. Of each tensor the first elements
are looked at, so that this costs no copy of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_tam.step.batch import Batch

_LOOKED_AT = 4096
"""Elements of a tensor."""
_WORTH_SAYING = 0.05
"""Share of the elements that did not move."""


class Vanishing:
    """Counts in one step what did not move, and says so when the host may know.

    Attributes:
        is_due: Whether no step with a learning rate was looked at yet.
        before: In the step that is looked at, first elements, what they were before, and those of the moment.
    """

    def __init__(self) -> None:
        """Nothing was looked at."""
        self.is_due = True
        self.before: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counts: Tensor | None = None
        self._rate: float | Tensor = 0.0

    def look_before(self, batches: Sequence[Batch]) -> None:
        """Keep what the first elements are, where a learning rate will move them; waits for nothing."""
        for batch in batches:
            tensors, rates = batch.tensors, [row.lr for row in batch.tensors.numbers]
            self.is_due &= not any(isinstance(rate, Tensor) or rate > 0.0 for rate in rates)
            if batch.options.is_corrected or batch.options.is_fake:
                continue
            for param, moment, group in zip(tensors.params, tensors.firsts, tensors.groups, strict=True):
                rate = rates[group]
                if param.dtype != torch.bfloat16 or not (param.is_contiguous() and moment.is_contiguous()):
                    continue
                if isinstance(rate, Tensor) or rate > 0.0:
                    self._rate, first = rate, param.view(-1)[:_LOOKED_AT]
                    self.before.append((first, first.clone(), moment.view(-1)[: len(first)]))

    def look_after(self, *, on_host: bool) -> None:
        """Count what the step did not move though it was to, and say so if the host may read numbers."""
        counts = [
            torch.stack([((now == before) & (moment != 0)).sum(), (moment != 0).sum()])
            for now, before, moment in self.before
        ]
        self._counts = torch.stack([each.to(counts[0].device) for each in counts]).sum(0)
        self.before = []
        if on_host:
            self.say()

    def say(self) -> None:
        """Warn if much did not move. Waits for an accelerator, once."""
        if self._counts is None or type(self._counts) is not Tensor:
            return
        (same, wanted), self._counts = self._counts.tolist(), None
        if wanted and float(self._rate) > 0.0 and same > _WORTH_SAYING * wanted:
            warnings.warn(
                f"{same / wanted:.0%} of the elements of bfloat16 parameters did not move in a step with a learning "
                f"rate of {float(self._rate):g}: what is less than 1/512 of a weight rounds to nothing. Pass "
                "param_correction='bits16' (--optim_args param_correction=bits16; 2 bytes a parameter), or train "
                "float32 weights under bf16 mixed precision",
                UserWarning,
                stacklevel=2,
            )
