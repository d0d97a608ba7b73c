"""The tensors on one device that are stepped alike, and what becomes known of them in the course of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.backends import Backend, Report, Tensors
from hf_tam.step.scalars import PackedScalars
from hf_tam.update import Coefficients, Numbers, Scalar, Stage

# What a step that changes nothing looks like; `eps` keeps the denominator away from 0.
_IDLE: dict[str, float] = {
    "decay": 1.0, "first_weight": 0.0, "second_decay": 1.0, "second_weight": 0.0, "eps": 1.0,
    "momentum": 1.0, "gain": 0.0, "step_size": 0.0,
}  # fmt: skip


class Options(NamedTuple):
    """What must be equal for tensors to be stepped together; param groups may differ in all that is a number."""

    device: torch.device
    scope: str
    nonfinite: str
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    is_fake: bool

    @property
    def on_host(self) -> bool:
        """Whether numbers may be read by the host: on the CPU without `capturable`. Elsewhere none ever is."""
        return self.device.type == "cpu" and not self.capturable and not self.is_fake


@dataclass(slots=True)
class Batch:
    """The tensors of one step that share `options`.

    Attributes:
        options: What they have in common.
        tensors: The n tensors.
        indices: The position of each among all logical tensors of the optimizer.
        present: For each whether this rank has a gradient of it, not one that stands in.
        backend: What executes the step.
        packed: The scalar states as they lie in the optimizer's state, to be written to.
        keys: Their names.
        sums: Rows <m, g>, |m|^2, |g|^2, raw |g|^2, shape (n, 4). |m|^2 is of the moment as it is stored.
        measured: Whether `sums` were taken at all.
        anywhere: Whether any rank has a gradient of the tensor, shape (n,), or None where all have one.
        keep: False where the step is skipped, shape (n,), or None where nothing is.
        clip: The factor on every gradient, shape (): what clips their global norm, or undoes a loss scale; or None.
        is_off: Whether the whole step is called off, shape (), or None where it cannot be.
        cosine: s_t, shape (n,).
        damping: The damping applied in this step, shape (n,).
        factor: c_t, the factor on the gradient in this step, shape (n,), or None where the report does not say.
    """

    options: Options
    tensors: Tensors
    indices: list[int]
    present: list[bool]
    backend: Backend
    packed: PackedScalars
    keys: tuple[str, ...]
    sums: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.float64, device="cpu"))
    measured: bool = True
    anywhere: Tensor | None = None
    keep: Tensor | None = None
    clip: Tensor | None = None
    is_off: Tensor | None = None
    cosine: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    damping: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    factor: Tensor | None = None
    _scalars: dict[str, Tensor] | None = None
    _numbers: Numbers | None = None

    def __len__(self) -> int:
        """How many tensors."""
        return len(self.indices)

    @property
    def on_host(self) -> bool:
        """See `Options`."""
        return self.options.on_host

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.options.device

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The scalar states before this step by name (`step`, `torque`, ...), shape (n,), `accumulator_dtype`."""
        if self._scalars is None:
            matrix = self.packed.matrix
            rows = matrix.to(update.accumulator_dtype(matrix.device), copy=True).unbind()
            self._scalars = dict(zip(self.keys, rows, strict=True))
        return self._scalars

    @property
    def numbers(self) -> Numbers:
        """The hyperparameters, a float where all param groups agree and shape (n,) elsewhere."""
        if self._numbers is None:
            tensors = self.tensors
            kept = tensors.memory.kept.setdefault("columns", {})
            self._numbers = beside_each_other(tensors.numbers, tensors.groups, device=self.device, kept=kept)
        return self._numbers

    @property
    def raw_grad_sq(self) -> Tensor:
        """|g|^2 of each gradient as the backward pass left it, shape (n,)."""
        return self.sums[:, 3]

    def finite(self) -> Tensor:
        """Whether each gradient is free of NaN and Inf, shape (n,) bool; one that no rank has is."""
        return self.raw_grad_sq.isfinite()

    def any_active(self) -> bool:
        """Whether any torque still acts. Where the host must not look, yes."""
        if not self.on_host or not self.numbers.torque_ends:
            return True
        return bool((self.scalars["step"] < self.numbers.torque_steps).any())

    def take_sums(self, *, with_dot: bool, needs_norms: bool, only_norms: bool = False) -> Tensor:
        """The partial sums of what this rank holds, shape (n, 4).

        Args:
            with_dot: Whether every tensor's dot product is needed (a shared angle); otherwise it is taken only where
                the torque still acts. Sums that nothing needs are not taken; `measured` is then False and all are 0.
            needs_norms: Whether those of the gradients are wanted where no angle is: to find NaN and Inf, or to clip.
            only_norms: Whether they are all that is wanted.
        """
        count, numbers = len(self), self.numbers
        if only_norms:
            return self.backend.partial_sums(self.tensors, with_dot=[False] * count)
        wanted = [True] * count
        if not with_dot and self.on_host and numbers.torque_ends:
            wanted = (self.scalars["step"] < numbers.torque_steps).tolist()
        if not any(wanted) and not needs_norms:
            self.measured = False
            return self.packed.matrix.new_zeros(count, update.NUM_SUMS, dtype=update.accumulator_dtype(self.device))
        return self.backend.partial_sums(self.tensors, with_dot=wanted)

    def set_sums(self, reduced: Tensor, anywhere: Tensor | None) -> None:
        """Take the sums of whole tensors, and leave out what no rank has a gradient of."""
        self.sums, self.anywhere = reduced, anywhere
        self.keep = None if anywhere is None or (self.on_host and bool(anywhere.all())) else anywhere

    def set_report(self, report: Report) -> None:
        """Take over what a backend saw that has taken the whole step by itself."""
        self.sums, self.cosine, self.damping, self.keep = report

    def angle_sums(self) -> list[Tensor]:
        """<m, g>, |m|^2 and |g|^2, shape (n,) each, 0 where no rank has a gradient; m is as it is stored."""
        rows = self.sums.unbind(1)[:3]
        return list(rows) if self.anywhere is None else [torch.where(self.anywhere, row, 0.0) for row in rows]

    def unscale_grads(self, factor: Tensor) -> None:
        """Have every gradient multiplied by `factor`, shape (), in the update; correct the sums for it."""
        factor = factor.to(self.device, self.sums.dtype)
        square = factor.square()
        self.sums = self.sums * torch.stack([factor, torch.ones_like(factor), square, square])
        self.clip = factor

    def clip_grads(self, factor: Tensor) -> None:
        """Have every gradient multiplied by `factor`, shape (), in the update; the sums stay what they were before."""
        self.clip = factor if self.clip is None else self.clip * factor

    def scale_grads_now(self) -> None:
        """Multiply the gradients themselves by what they were to be multiplied by in the update."""
        if self.clip is not None:
            for grad in self.tensors.grads:
                grad.mul_(self.clip)
            self.clip = None

    def call_off(self, is_off: Tensor) -> None:
        """Leave out the whole step where `is_off` is True, shape ()."""
        self.is_off = is_off
        self.leave_out(~is_off)

    def leave_out(self, keep: Tensor) -> None:
        """Step only where `keep` is True, shape (n,) or ()."""
        keep = keep.expand(len(self))
        self.keep = keep if self.keep is None else keep & self.keep

    def advance(self, shared: Tensor | None) -> None:
        """Take the step, by the sums.

        Args:
            shared: The sums of the one angle for all tensors, shape (3,); None: each has its own.
        """
        sums = self.angle_sums() if shared is None else list(shared.unsqueeze(1).expand(3, len(self)))
        stage = update.scalar_stage(sums, self.scalars, self.numbers, shared=shared is not None)
        self.cosine, self.damping, self.factor = stage.cosine, stage.damping, stage.factor
        if self.keep is not None:  # a torque that stays what it was
            self.damping = torch.where(self.keep, stage.damping, update.damping(self.scalars["torque"]))
        self._update(stage)
        for row, key in enumerate(self.keys):
            values = stage.states[key]
            if self.keep is not None:
                values = torch.where(self.keep, values, self.scalars[key])
            self.packed.matrix[row].copy_(values)

    def _update(self, stage: Stage) -> None:
        """Update parameters and moments, leaving out what is skipped."""
        tensors, coefficients, keep = self.tensors, stage.coefficients, self.keep
        if not self.on_host:
            masked = coefficients if keep is None else _masked(coefficients, keep)
            self.backend.update(tensors, masked, keep=keep, clip=self.clip, on_host=False)
            return
        if keep is not None:
            places = keep.nonzero().flatten().tolist()
            tensors = tensors.only(places)
            coefficients = type(coefficients)(*(column[places] for column in coefficients))
        clip = None if self.clip is None or float(self.clip) == 1.0 else float(self.clip)
        if len(tensors):
            self.backend.update(tensors, coefficients, keep=None, clip=clip, on_host=True)

    def effective_learning_rates(self) -> Callable[[], Tensor]:
        """What the learning rate amounts to beside AdamW's or SGD's, shape (n,); NaN where the step is skipped.

        2 lr c_t in the calibrated forms, in which c = 1/2 is neutral; lr c_t in the paper's.

        Returns:
            A function that works it out, which most steps need not do. It holds on to no parameter or gradient.
        """
        rows, groups, device = self.tensors.numbers, self.tensors.groups, self.device
        if any(isinstance(row.lr, Tensor) for row in rows):  # schedulers write to it
            rows = [row._replace(lr=row.lr.clone() if isinstance(row.lr, Tensor) else row.lr) for row in rows]
        damping, factor, keep = self.damping, self.factor, self.keep

        def rates() -> Tensor:
            numbers = beside_each_other(rows, groups, device=device, kept={})
            applied = damping + numbers.damping_eps if factor is None else factor
            effective = numbers.lr * (applied / numbers.neutral)
            return effective if keep is None else torch.where(keep, effective, torch.nan)

        return rates

    def scale_state(self, factor: Tensor) -> None:
        """Multiply every state of every tensor by `factor`, shape ()."""
        factor = factor.to(self.device)
        self.packed.matrix.mul_(factor)
        for moment in (*self.tensors.firsts, *self.tensors.seconds):
            moment.mul_(factor)


def _masked(coefficients: Coefficients, keep: Tensor) -> Coefficients:
    """The coefficients, those of a step that changes nothing where it is skipped."""
    columns = coefficients._asdict().items()
    return type(coefficients)(**{name: torch.where(keep, column, _IDLE[name]) for name, column in columns})


def beside_each_other(
    rows: Sequence[Numbers], groups: Sequence[int], *, device: torch.device, kept: dict[str, Any]
) -> Numbers:
    """The hyperparameters of n tensors: a float where all param groups agree, and shape (n,) elsewhere.

    Args:
        rows: Those of each param group.
        groups: The place in `rows` of each tensor.
        device: Where the tensors are.
        kept: Columns of the last step, by name; written to. What is kept is not sent to an accelerator again.
    """
    dtype = update.accumulator_dtype(device)

    def column(name: str, values: Sequence[Scalar]) -> Scalar:
        if any(isinstance(value, Tensor) for value in values):  # whose numbers the host does not know
            each = [_on(device, torch.as_tensor(value, dtype=dtype), dtype) for value in values]
            return each[0] if len(each) == 1 else torch.stack([each[group] for group in groups])
        if all(value == values[0] for value in values):
            return values[0]
        if name not in kept or kept[name][:2] != (values, groups):
            listed = [values[group] for group in groups]
            kept[name] = (values, groups, _on(device, torch.tensor(listed, dtype=dtype, device="cpu"), dtype))
        found: Tensor = kept[name][2]
        return found

    return Numbers(
        **{name: column(name, values) for name, values in zip(Numbers._fields, zip(*rows, strict=True), strict=True)}
    )


def _on(device: torch.device, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    if numbers.device.type == "cpu" and device.type in ("cuda", "xpu"):
        numbers = numbers.pin_memory()  # otherwise the copy waits for the device
    return numbers.to(device, dtype, non_blocking=True).squeeze()
