"""The tensors of one param group on one device, and the scalar arithmetic of their step as 1-D tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.backends import NUM_SUMS, Backend, Entry, Scalar, StepScalars
from hf_tam.backends.whole import StepReport
from hf_tam.scalars import PackedScalars
from hf_tam.update import AdamCoefficients, SgdCoefficients

# What a step that changes nothing looks like; `eps` keeps the denominator away from 0.
_IDLE: dict[str, float] = {
    "decay": 1.0, "first_weight": 0.0, "second_decay": 1.0, "second_weight": 0.0, "eps": 1.0,
    "momentum": 1.0, "gain": 0.0, "step_size": 0.0,
}  # fmt: skip


@dataclass(slots=True)
class Bucket:
    """The tensors of one param group on one device that have a gradient in this step.

    Attributes:
        group: The param group.
        entries: Its tensors, n of them.
        backend: What executes the step.
        on_host: Whether scalars may be read by the host (the CPU without `capturable`); elsewhere none ever is.
        scalars: The scalar states before this step by name (`step`, `torque`, ...), shape (n,), `accumulator_dtype`.
        matrix: The same as they lie in the optimizer's state, to be written to: fp32, shape (len(scalars), n).
        active: Whether the torque still acts (`torque_steps`), shape (n,), or None where it always does.
        sums: Rows <m, g>, |m|^2, |g|^2, raw |g|^2, shape (n, 4). |m|^2 is of the moment as it is stored.
        present: Whether any rank has a gradient of the tensor, shape (n,), or None where all have one.
        keep: False where the step is skipped, shape (n,), or None where nothing is.
        clip: The factor on every gradient that clips their global norm, shape (), or None.
        measured: Whether `sums` were taken at all.
        cosine: s_t, shape (n,).
        damping: The damping applied in this step, shape (n,).
        factor: c_t, the factor on the gradient in this step, shape (n,), or None where the report does not say.
    """

    group: dict[str, Any]
    entries: list[Entry]
    backend: Backend
    on_host: bool
    scalars: dict[str, Tensor]
    matrix: Tensor
    active: Tensor | None
    sums: Tensor = field(default_factory=lambda: torch.empty(0, 4))
    present: Tensor | None = None
    keep: Tensor | None = None
    clip: Tensor | None = None
    measured: bool = True
    cosine: Tensor = field(default_factory=lambda: torch.empty(0))
    damping: Tensor = field(default_factory=lambda: torch.empty(0))
    factor: Tensor | None = None

    @classmethod
    def of(
        cls, group: dict[str, Any], entries: list[Entry], *, packed: PackedScalars, backend: Backend, on_host: bool
    ) -> Bucket:
        """Read the scalar states of `entries`, which are the columns of `packed`."""
        scalars, limit = packed.read(), group["torque_steps"]
        active = None if limit is None else scalars["step"] < limit
        return cls(group, entries, backend, on_host, scalars, packed.matrix, active)

    @property
    def step(self) -> Tensor:
        """The t of this step, counted from 1, shape (n,)."""
        return self.scalars["step"] + 1.0

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.scalars["step"].device

    @property
    def literal(self) -> bool:
        """Whether the paper's recurrence is taken literally."""
        return bool(self.group["step_size"] == "paper")

    def any_active(self) -> bool:
        """Whether any torque still acts. Where the host must not look, yes."""
        return self.active is None or not self.on_host or bool(self.active.any())

    def take_sums(self, *, with_dot: bool, only_norms: bool = False) -> Tensor:
        """The partial sums of what this rank holds, shape (n, 4).

        Args:
            with_dot: Whether every tensor's dot product is needed (a shared angle); otherwise it is taken only where
                the torque still acts. Sums that nothing needs are not taken; `measured` is then False and all are 0.
            only_norms: Whether those of the gradients are all that is needed.
        """
        count = len(self.entries)
        if only_norms:
            return self.backend.partial_sums(self.entries, with_dot=[False] * count)
        if with_dot or self.active is None or not self.on_host:
            wanted = [True] * count
        else:
            wanted = self.active.tolist()
        if not any(wanted) and self.group["nonfinite"] == "propagate" and self.group["max_grad_norm"] is None:
            self.measured = False
            return self.scalars["step"].new_zeros(count, NUM_SUMS)
        return self.backend.partial_sums(self.entries, with_dot=wanted)

    def set_report(self, report: StepReport) -> None:
        """Take over what a backend saw that has taken the whole step by itself."""
        self.cosine, self.damping, self.sums, self.keep = report

    def angle_sums(self) -> Sequence[Tensor]:
        """<m, g>, |m|^2 and |g|^2, shape (n,) each, 0 where no rank has a gradient; m is as it is stored."""
        rows = self.sums.unbind(1)[:3]
        return rows if self.present is None else [torch.where(self.present, row, 0.0) for row in rows]

    @property
    def raw_grad_sq(self) -> Tensor:
        """|g|^2 of each gradient as the backward pass left it, shape (n,)."""
        return self.sums[:, 3]

    def clipped_square(self) -> Tensor:
        """What these gradients add to the square of the norm that is clipped, shape (); skipped ones nothing."""
        squares = self.raw_grad_sq
        return (torch.where(self.finite(), squares, 0.0) if self.group["nonfinite"] == "skip" else squares).sum()

    def finite(self) -> Tensor:
        """Whether each gradient is free of NaN and Inf, shape (n,) bool; one that no rank has is."""
        return self.raw_grad_sq.isfinite()

    def set_sums(self, reduced: Tensor, present: Tensor | None) -> None:
        """Take the sums of whole tensors, and leave out what no rank has a gradient of."""
        self.sums, self.present = reduced, present
        self.keep = None if present is None or (self.on_host and bool(present.all())) else present

    def coefficient(self, cosine: Tensor) -> Tensor:
        """Advance the torque by `cosine` and return c_t, the factor on the gradient, shape (n,)."""
        self.cosine = cosine
        previous = self.scalars["torque"]
        torque = update.torque(previous, cosine, gamma=self.group["gamma"])
        torque = torque if self.active is None else torch.where(self.active, torque, previous)
        self.store("torque", torque)
        damping = update.damping(torque)
        coefficient: Tensor = self.group["damping_eps"] + damping
        if self.active is not None:
            neutral = 1.0 if self.literal else 0.5
            damping = torch.where(self.active, damping, neutral)
            coefficient = torch.where(self.active, coefficient, neutral)
        if self.keep is not None:  # a torque that stays what it was
            damping = torch.where(self.keep, damping, update.damping(previous))
        self.damping, self.factor = damping, coefficient
        return coefficient

    def effective_learning_rates(self) -> Callable[[], Tensor]:
        """What the learning rate amounts to beside AdamW's or SGD's, shape (n,); NaN where the step is skipped.

        2 lr c_t in the calibrated forms, in which c = 1/2 is neutral; lr c_t in the paper's.

        Returns:
            A function that works it out, which most steps need not do. It holds on to no parameter or gradient.
        """
        lr, keep = self.learning_rate(), self.keep
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # schedulers write to it
        scale, offset = (1.0 if self.literal else 2.0), self.group["damping_eps"]
        damping, factor = self.damping, self.factor

        def rates() -> Tensor:
            effective = lr * (scale * (damping + offset if factor is None else factor))
            return effective if keep is None else torch.where(keep, effective, torch.nan)

        return rates

    def learning_rate(self) -> Scalar:
        """The group's learning rate: a float on the host, otherwise as it is, on the bucket's device."""
        lr: Scalar = self.group["lr"]
        if self.on_host:
            return float(lr)
        return lr.to(self.device, self.scalars["step"].dtype, non_blocking=True) if isinstance(lr, Tensor) else lr

    def masked(self, coefficients: AdamCoefficients | SgdCoefficients) -> AdamCoefficients | SgdCoefficients:
        """The coefficients, those of a step that changes nothing where the step is skipped."""
        if self.keep is None:
            return coefficients
        columns = coefficients._asdict().items()
        return type(coefficients)(**{name: torch.where(self.keep, column, _IDLE[name]) for name, column in columns})

    def execute(self, coefficients: AdamCoefficients | SgdCoefficients) -> None:
        """Update parameters and moments and count the step, leaving out what is skipped."""
        entries = self.entries
        if not self.on_host:
            scalars = StepScalars.on_device(self.masked(coefficients), self.keep, clip=self.clip)
        else:
            if self.keep is not None:
                entries = [entry for entry, keep in zip(entries, self.keep.tolist(), strict=True) if keep]
                coefficients = type(coefficients)(*(column[self.keep] for column in coefficients))
            scalars = StepScalars.on_host(coefficients, clip=self.clip)
        run = self.backend.adam if isinstance(coefficients, AdamCoefficients) else self.backend.sgd
        run(entries, scalars)
        self.store("step", self.step)

    def store(self, key: str, values: Tensor) -> None:
        """Write a 1-D tensor back to the scalar states, except where the step is skipped."""
        if self.keep is not None:
            values = torch.where(self.keep, values, self.scalars[key])
        self.matrix[list(self.scalars).index(key)].copy_(values)

    def scale_state(self, factor: Tensor) -> None:
        """Multiply every state of every entry by `factor`, shape ()."""
        self.matrix.mul_(factor)
        for entry in self.entries:
            for moment in [entry.first] if entry.second is None else [entry.first, entry.second]:
                moment.mul_(factor)
