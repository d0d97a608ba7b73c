"""One step, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.family import Family
from hf_tam.sharding import LocalReducer, ParameterReducer, Reducer, device_of
from hf_tam.step import guards
from hf_tam.step.batch import Batch
from hf_tam.step.gathering import Gatherer, rounds
from hf_tam.step.telemetry import Record, Telemetry
from hf_tam.step.vanishing import Vanishing

ParamGroups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]
Naming = Callable[[int], str]


class Pipeline:
    """Takes the steps of one optimizer.

    Args:
        family: Which optimizer it is.
        telemetry: Is told what was seen.
    """

    def __init__(self, family: Family, telemetry: Telemetry) -> None:
        """Nothing is known of any tensor yet."""
        self._family, self._telemetry = family, telemetry
        self._gatherer = Gatherer(family)
        self.vanishing = Vanishing()

    def step(
        self,
        param_groups: ParamGroups,
        states: States,
        reducer: Reducer,
        *,
        name: Naming,
        scaling: guards.Scaling | None = None,
        repeats: bool = False,
    ) -> None:
        """Take one step: sums, angles, coefficients, update. Until the update nothing is changed.

        Communication: that of `Reducer.reduce`, once or, with coupled decay and a limit, twice.

        Args:
            param_groups: The optimizer's.
            states: `optimizer.state`; what a tensor lacks is created.
            reducer: Makes the sums whole.
            name: The name of the logical tensor at a position.
            scaling: What clips the gradients or undoes a loss scale, if anything does.
            repeats: Whether a parameter stands in the groups more than once.

        Raises:
            ValueError: One does, and its gradient would be clipped or unscaled as often, before anything is changed.
        """
        if repeats and scaling is not None:
            scaling.refuse_repeats(is_coupled=self._is_coupled(param_groups))
        is_new = not any(isinstance(key, Tensor) for key in states)  # hooks put entries of their own there
        batches: list[Batch] = []
        for groups in rounds(param_groups) if repeats else [param_groups]:
            taken = self._take(groups, states, reducer, scaling, name)
            if taken is None:
                return
            batches += taken
        telemetry = self._telemetry
        if reducer.sees_all:  # DeepSpeed takes a step in several calls, each with its own reducer
            telemetry.records.clear()
        telemetry.records[reducer] = [_record(batch) for batch in batches]
        if telemetry.promised is not None:
            telemetry.keep_promise(batches[0].is_off if batches else None)
        if self.vanishing.before:
            self.vanishing.look_after(on_host=all(batch.options.on_host for batch in batches))
        if is_new and isinstance(reducer, ParameterReducer):
            _forget_initialisation(batches)
        if not batches or telemetry.is_idle or any(batch.keep is not None for batch in batches):
            telemetry.warn(batches)

    def _take(
        self, groups: ParamGroups, states: States, reducer: Reducer, scaling: guards.Scaling | None, name: Naming
    ) -> list[Batch] | None:
        """Step every tensor once, as the paper does; None where GradScaler calls the step off."""
        # The tensors that have a gradient, with their states, side by side.
        batches = left = self._gatherer.batches(groups, states, reducer, name=name)
        if self.vanishing.is_due or len(batches) > 1:
            self._look_at(batches)
        # Where nothing comes between the sums and the update, a backend may take the whole step by itself.
        is_local = isinstance(reducer, LocalReducer)
        if is_local and scaling is None:
            left = self._take_in_one_pass(batches)
        for batch in left:
            batch.read_scalars(self._family.scalar_states)
        # <m, g>, |m|^2 and |g|^2 of whole tensors. Ranks agree on how often, whatever this one has gradients of.
        if scaling is not None and self._is_coupled(groups):
            self._scale_first(left, reducer, groups, scaling, name)
        elif left or not is_local:
            self._reduce(left, reducer, groups, needs_norms=scaling is not None)
            if scaling is not None:
                scaling.apply(left)
        # What must not be stepped. An accelerator is not asked, so that there everything is masked.
        if scaling is not None and scaling.calls_off(left, is_sharded=not is_local):
            return None
        if not all(
            batch.options.on_host and bool(batch.sums[:, update.RAW_GRAD_SQ].isfinite().all()) for batch in left
        ):
            guards.refuse_nonfinite(left, name)
            guards.leave_out_nonfinite(left, self._telemetry)
        # The four lines of the paper (`update.scalar_stage`), and the update of parameters and moments.
        together = [batch for batch in left if batch.options.scope == "model"]
        shared = _shared_sums(together) if together else None
        for batch in left:
            batch.advance(shared if batch.options.scope == "model" else None)
        # Other processes read these where they lie (share_memory_, as for Hogwild).
        for state, part in [apart for batch in batches for apart in batch.apart]:
            state.copy_(part.view(state.shape))
        return batches

    def _look_at(self, batches: list[Batch]) -> None:
        """Before anything is done: what does not fit together, and in a first step what will not move."""
        if len(batches) > 1:
            guards.require_one_device(batches)
        if self.vanishing.is_due:
            self.vanishing.look_before(batches)

    def _is_coupled(self, param_groups: ParamGroups) -> bool:
        """Whether a weight decay is added to gradients."""
        return self._family.coupled and any(group["weight_decay"] for group in param_groups)

    def _take_in_one_pass(self, batches: list[Batch]) -> list[Batch]:
        """Let backends step by themselves what depends on nothing else, and return the batches that are left."""
        if any(batch.options.nonfinite == "raise" for batch in batches):  # before anything is changed
            return batches
        left = []
        for batch in batches:
            one_pass, report = batch.backend.one_pass, None
            if batch.options.scope == "tensor" and one_pass is not None:
                report = one_pass(
                    batch.tensors,
                    batch.matrix,
                    skip_nonfinite=batch.options.nonfinite == "skip",
                    skipped=self._telemetry.skipped[batch.options.device],
                )
            if report is None:
                left.append(batch)
            else:
                batch.sums, batch.cosine, batch.damping, batch.keep = report
        return left

    def _reduce(
        self,
        batches: list[Batch],
        reducer: Reducer,
        param_groups: ParamGroups,
        *,
        needs_norms: bool,
        only_norms: bool = False,
    ) -> None:
        """Take the partial sums and make them global: once a step on every rank, whatever this rank holds.

        Args:
            batches: The tensors.
            reducer: Makes them global.
            param_groups: All of the optimizer's, also those without a gradient.
            needs_norms: Whether the norms of the gradients are wanted where no angle is.
            only_norms: Leave the angles out.
        """
        # One torque that still acts needs the products of all tensors, also of those whose own has ended.
        shared = any(batch.options.scope == "model" and batch.any_active() for batch in batches)
        local = [
            batch.take_sums(
                with_dot=shared and batch.options.scope == "model",
                needs_norms=needs_norms or batch.options.nonfinite != "propagate",
                only_norms=only_norms,
            )
            for batch in batches
        ]
        if isinstance(reducer, LocalReducer):
            for batch, sums in zip(batches, local, strict=True):
                batch.sums = sums
            return
        # A rank without a gradient in this step (FSDP1's empty slices, an expert without a token) has no rows, and
        # must join all the same, in the dtype and on the device of the others: they would wait for it.
        params = (param for group in param_groups for param in group["params"] if param is not None)
        device = device_of(params)
        nothing = torch.zeros(0, update.NUM_SUMS, dtype=update.accumulator_dtype(device), device=device)
        reduced = reducer.reduce(
            torch.cat([nothing, *(rows.to(device, nothing.dtype) for rows in local)]),
            [index for batch in batches for index in batch.indices],
            present=[is_present for batch in batches for is_present in batch.present],
        )
        sizes = [len(batch.indices) for batch in batches]
        marks = [None] * len(batches) if reduced.present is None else torch.split(reduced.present, sizes)
        for batch, sums, mark in zip(batches, torch.split(reduced.sums, sizes), marks, strict=True):
            device = batch.options.device
            batch.set_sums(sums.to(device), None if mark is None else mark.to(device))

    def _scale_first(
        self,
        batches: list[Batch],
        reducer: Reducer,
        param_groups: ParamGroups,
        scaling: guards.Scaling,
        name: Naming,
    ) -> None:
        """Scale the gradients themselves, to which a coupled decay is added, before their sums are taken."""
        self._reduce(batches, reducer, param_groups, needs_norms=True, only_norms=True)
        scaling.apply(batches)
        # Before gradients are multiplied in place: a step that is refused must have changed nothing. Under GradScaler
        # an Inf is usual, and its own to find.
        if scaling.found_inf is None and scaling.grad_scale is None:
            guards.refuse_nonfinite(batches, name)
        squares = [batch.sums[:, update.RAW_GRAD_SQ] for batch in batches]
        for batch in batches:
            batch.scale_grads_now()
        self._reduce(batches, reducer, param_groups, needs_norms=True)
        for batch, square in zip(batches, squares, strict=True):  # reported is the norm before clipping
            batch.sums[:, update.RAW_GRAD_SQ] = square


def _record(batch: Batch) -> Record:
    """What is kept of a step: no parameter, no gradient, and no learning rate that schedulers write to."""
    tensors, numbers = batch.tensors, batch.tensors.numbers
    if not batch.options.on_host:
        numbers = [row._replace(lr=row.lr.clone()) if isinstance(row.lr, Tensor) else row for row in numbers]
    squares = batch.sums[:, update.RAW_GRAD_SQ] if batch.measured else None
    return Record(
        batch.indices, batch.cosine, batch.damping, batch.factor, batch.keep, squares, numbers, tensors.groups
    )  # fmt: skip


def _shared_sums(batches: Sequence[Batch]) -> Tensor:
    """The sums of the one angle of scope "model", shape (3,)."""
    return torch.stack(
        [update.shared_sums(batch.angle_sums(), batch.states.get("exp_avg_scale"), batch.numbers) for batch in batches]
    ).sum(0)


def _forget_initialisation(batches: Sequence[Batch]) -> None:
    """Undo a step that was taken only to create state.

    torch.distributed.checkpoint's state-dict helpers step once with lr = 0 and zero gradients, and leave step = 1
    behind (https://github.com/pytorch/pytorch/issues/164929); training would not be the same afterwards. Not for
    DeepSpeed's buffers: its groups come one at a time, and LoRA's A matrices, whose first gradients are 0, may be one.
    """
    rates = [row.lr for batch in batches for row in batch.tensors.numbers]
    if not batches or not all(batch.measured for batch in batches):
        return
    if any(not isinstance(rate, Tensor) and rate != 0.0 for rate in rates):
        return
    # All tensors together and never one by itself: LoRA's A matrices have zero gradients in their first step, and a
    # warm-up begins with a rate of 0; torch's AdamW counts both steps.
    flags = [(batch.sums[:, update.RAW_GRAD_SQ] == 0.0).all() for batch in batches]
    flags += [rate.reshape(()) == 0.0 for rate in rates if isinstance(rate, Tensor)]
    idle = torch.stack([flag.to(batches[0].options.device) for flag in flags]).all()
    for batch in batches:
        batch.scale_state(~idle)
