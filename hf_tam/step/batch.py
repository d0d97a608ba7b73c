"""The tensors on one device that are stepped alike, and what becomes known of them in the course of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.backends import Backend, Tensors
from hf_tam.update import Coefficients, Numbers, Scalar

# What a step that changes nothing looks like; `eps` keeps the denominator away from 0.
_IDLE: dict[str, float] = {
    "decay": 1.0, "first_weight": 0.0, "second_decay": 1.0, "second_weight": 0.0, "eps": 1.0,
    "momentum": 1.0, "gain": 0.0, "step_size": 0.0,
}  # fmt: skip


class Options(NamedTuple):
    """What must be equal for tensors to be stepped together; param groups may differ in all that is a number.

    Attributes:
        on_host: Whether numbers may be read by the host: on the CPU without `capturable`. Elsewhere none ever is.
        is_fake: Whether the tensors have shapes and no values (FakeTensorMode, by which memory is estimated).
        is_corrected: Whether what the parameters leave out of the weights is kept.
        moment_dtype: What the moments are kept in; None: as the parameters.
    """

    device: torch.device
    scope: str
    nonfinite: str
    maximize: bool
    foreach: bool | None
    fused: bool | None
    on_host: bool
    is_fake: bool
    is_corrected: bool
    moment_dtype: torch.dtype | None


@dataclass(slots=True)
class Batch:
    """The tensors of one step that share `options`.

    Attributes:
        options: What they have in common.
        tensors: The n tensors.
        indices: The position of each among all logical tensors of the optimizer.
        present: For each whether this rank has a gradient of it, not one that stands in; empty where all are whole.
        entries: `optimizer.state[param]` of the parameters, or flat buffers, that they come from.
        shapes: For each entry the shape of a scalar state.
        backend: What executes the step.
        matrix: The scalar states as rows of one fp32 matrix, a column a tensor, to be written to; see `pack`.
        apart: Scalar states that lie elsewhere, each with the part of the matrix that they are to hold.
        sums: Rows <m, g>, |m|^2, |g|^2, raw |g|^2, shape (n, 4). |m|^2 is of the moment as it is stored.
        measured: Whether `sums` were taken at all.
        anywhere: Whether any rank has a gradient of the tensor, shape (n,), or None where all have one.
        keep: False where the step is skipped, shape (n,), or None where nothing is.
        clip: The factor on every gradient, shape (): what clips their global norm, or undoes a loss scale; or None.
        is_off: Whether the whole step is called off, shape (), or None where it cannot be.
        cosine: s_t, shape (n,).
        damping: The damping applied in this step, shape (n,).
        factor: c_t, the factor on the gradient in this step, shape (n,), or None where the backend does not say.
        states: The scalar states before this step by name, shape (n,), `accumulator_dtype`; see `read_scalars`.
        numbers: The hyperparameters, a float where all param groups agree and shape (n,) elsewhere; likewise.
    """

    options: Options
    tensors: Tensors
    indices: list[int] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    backend: Backend = field(init=False)
    matrix: Tensor = field(init=False)
    apart: Sequence[tuple[Tensor, Tensor]] = ()
    sums: Tensor = field(init=False)
    measured: bool = True
    anywhere: Tensor | None = None
    keep: Tensor | None = None
    clip: Tensor | None = None
    is_off: Tensor | None = None
    cosine: Tensor = field(init=False)
    damping: Tensor = field(init=False)
    factor: Tensor | None = None
    states: dict[str, Tensor] = field(init=False)
    numbers: Numbers = field(init=False)

    def read_scalars(self, keys: Sequence[str]) -> None:
        """Set `states` and `numbers`, where the arithmetic is torch's."""
        device, tensors = self.options.device, self.tensors
        # A copy also where the accumulators are fp32 as the states are (MPS): `advance` writes to the matrix while it
        # still needs what was there before the step.
        rows = self.matrix.to(update.accumulator_dtype(device), copy=True).unbind()
        self.states = dict(zip(keys, rows, strict=True))
        kept = tensors.memory.kept.setdefault("columns", {})
        self.numbers = beside_each_other(tensors.numbers, tensors.groups, device=device, kept=kept)

    def finite(self) -> Tensor:
        """Whether each gradient is free of NaN and Inf, shape (n,) bool; one that no rank has is."""
        # The norm is known anyway, and is the same on every rank: to look at the gradients would take another pass
        # and, where they are cut, another collective.
        return self.sums[:, update.RAW_GRAD_SQ].isfinite()

    def any_active(self) -> bool:
        """Whether any torque still acts. Where the host must not look, yes."""
        if not self.options.on_host or not self.numbers.torque_ends:
            return True
        return bool((self.states["step"] < self.numbers.torque_steps).any())

    def take_sums(self, *, with_dot: bool, needs_norms: bool, only_norms: bool = False) -> Tensor:
        """The partial sums of what this rank holds, shape (n, 4).

        Args:
            with_dot: Whether every tensor's dot product is needed (a shared angle); otherwise it is taken only where
                the torque still acts. Sums that nothing needs are not taken; `measured` is then False and all are 0.
            needs_norms: Whether those of the gradients are wanted where no angle is: to find NaN and Inf, or to clip.
            only_norms: Whether they are all that is wanted.
        """
        wanted = [not only_norms] * len(self.indices)
        # On an accelerator the host does not know whose torque has ended: there every product is taken.
        if not with_dot and not only_norms and self.options.on_host and self.numbers.torque_ends:
            wanted = (self.states["step"] < self.numbers.torque_steps).tolist()
        if not any(wanted) and not needs_norms and not only_norms:
            self.measured = False
            dtype = update.accumulator_dtype(self.options.device)
            return self.matrix.new_zeros(len(wanted), update.NUM_SUMS, dtype=dtype)
        return self.backend.partial_sums(self.tensors, with_dot=wanted)

    def set_sums(self, reduced: Tensor, anywhere: Tensor | None) -> None:
        """Take the sums of whole tensors, and leave out what no rank has a gradient of."""
        self.sums, self.anywhere = reduced, anywhere
        self.keep = None if anywhere is None or (self.options.on_host and bool(anywhere.all())) else anywhere

    def angle_sums(self) -> list[Tensor]:
        """<m, g>, |m|^2 and |g|^2, shape (n,) each, 0 where no rank has a gradient; m is as it is stored."""
        # The one angle of scope "model" is over the tensors that have a gradient in this step: the moments of the
        # others, which are not 0, would turn it.
        rows = self.sums.unbind(1)[:3]
        return list(rows) if self.anywhere is None else [torch.where(self.anywhere, row, 0.0) for row in rows]

    def unscale_grads(self, factor: Tensor) -> None:
        """Have every gradient multiplied by `factor`, shape (), in the update; correct the sums for it."""
        factor = factor.to(self.options.device, self.sums.dtype)
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
        keep = keep.expand(len(self.indices))
        self.keep = keep if self.keep is None else keep & self.keep

    def advance(self, shared: Tensor | None) -> None:
        """Take the step, by the sums.

        Args:
            shared: The sums of the one angle for all tensors, shape (3,); None: each has its own.
        """
        sums = self.angle_sums() if shared is None else list(shared.unsqueeze(1).expand(3, len(self.indices)))
        stage = update.scalar_stage(sums, self.states, self.numbers, shared=shared is not None)
        self.cosine, self.damping, self.factor = stage.cosine, stage.damping, stage.factor
        tensors, coefficients, keep, clip = self.tensors, stage.coefficients, self.keep, self.clip
        if keep is not None:  # a torque that stays what it was
            self.damping = torch.where(keep, stage.damping, update.damping(self.states["torque"]))
        if self.options.on_host:  # what is skipped is left out
            if keep is not None:
                places = keep.nonzero().flatten().tolist()
                tensors, coefficients = tensors.only(places), picked(coefficients, places)
            # A factor of 1 is none, so that a norm below the limit leaves the step what it is without clipping, to the
            # bit.
            factor = None if clip is None or float(clip) == 1.0 else float(clip)
            if tensors.params:
                self.backend.update(tensors, coefficients, keep=None, clip=factor, on_host=True)
        else:
            masked = coefficients if keep is None else _masked(coefficients, keep)
            self.backend.update(tensors, masked, keep=keep, clip=clip, on_host=False)
        # In place: what stands in `optimizer.state` are views of this matrix.
        for row, (key, before) in zip(self.matrix, self.states.items(), strict=True):
            row.copy_(stage.states[key] if keep is None else torch.where(keep, stage.states[key], before))

    def scale_state(self, factor: Tensor) -> None:
        """Multiply every state of every tensor by `factor`, shape ()."""
        # A product and no branch, since on an accelerator the host does not know whether the factor is 0 or 1.
        factor = factor.to(self.options.device)
        self.matrix.mul_(factor)
        for moment in (*self.tensors.firsts, *self.tensors.seconds):
            moment.mul_(factor)


def picked(coefficients: Coefficients, places: Sequence[int]) -> Coefficients:
    """Those of some tensors."""
    return type(coefficients)(*(column[list(places)] for column in coefficients))


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
    columns: dict[str, Scalar] = {}
    for name, values in zip(Numbers._fields, zip(*rows, strict=True), strict=True):
        if any(isinstance(value, Tensor) for value in values):  # whose numbers the host does not know
            each = [_on(device, value) for value in values]
            columns[name] = each[0] if len(each) == 1 else torch.stack([each[group] for group in groups])
        elif all(value == values[0] for value in values):
            columns[name] = values[0]
        else:
            if name not in kept or kept[name][:2] != (values, groups):
                kept[name] = (values, groups, _on(device, [values[group] for group in groups]))
            columns[name] = kept[name][2]
    return Numbers(**columns)


def _on(device: torch.device, numbers: Scalar | list[Scalar]) -> Tensor:
    dtype = update.accumulator_dtype(device)
    held = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype, device="cpu")
    if held.device.type == "cpu" and device.type in ("cuda", "xpu"):
        held = held.to(dtype).pin_memory()  # otherwise the copy waits for the device
    return held.to(device, dtype, non_blocking=True).squeeze()
