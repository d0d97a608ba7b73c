"""One step, in the order in which it happens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam import update
from hf_tam.family import Family
from hf_tam.sharding import LocalReducer, Reducer, WholeParameters
from hf_tam.step import guards
from hf_tam.step.batch import Batch
from hf_tam.step.gathering import Gatherer, rounds
from hf_tam.step.telemetry import Telemetry

ParamGroups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


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

    def step(
        self,
        param_groups: ParamGroups,
        states: States,
        reducer: Reducer,
        *,
        name: Callable[[int], str],
        limit: float | None,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        repeats: bool = False,
    ) -> None:
        """Take one step: sums, angles, coefficients, update. Until the update nothing is changed.

        Communication: that of `Reducer.reduce`, once or, with coupled decay and a limit, twice.

        Args:
            param_groups: The optimizer's.
            states: `optimizer.state`; what a tensor lacks is created.
            reducer: Makes the sums whole.
            name: The name of the logical tensor at a position.
            limit: The norm to which the gradients are clipped, if they are.
            found_inf: Not 0 where the step must not be taken, shape () or (1,); torch.amp.GradScaler's.
            grad_scale: What the gradients are to be divided by, shape () or (1,); GradScaler's.
            repeats: Whether a parameter stands in a group more than once.

        Raises:
            ValueError: One does, and its gradient would be clipped or unscaled as often, before anything is changed.
        """
        if repeats and (limit is not None or (grad_scale is not None and self._is_coupled(param_groups))):
            raise ValueError(
                "a parameter stands in a param group more than once, and is stepped as often; "
                f"{'max_grad_norm' if limit is not None else 'the loss scale of GradScaler'} would be applied to its "
                "gradient as often, too. Nothing was changed; hand each parameter over once (dict.fromkeys(params))"
            )
        is_new = not any(isinstance(key, Tensor) for key in states)  # hooks put entries of their own there
        scaler = None if found_inf is None and grad_scale is None else guards.LossScale(found_inf, grad_scale)
        batches = []
        for groups in rounds(param_groups) if repeats else [param_groups]:
            taken = self._take(groups, states, reducer, limit, scaler, name=name)
            if taken is None:
                return
            batches += taken
        self._telemetry.record(reducer, batches)
        if is_new and isinstance(reducer, WholeParameters):
            _forget_initialisation(batches)
        self._telemetry.warn(batches)

    def _take(
        self,
        param_groups: ParamGroups,
        states: States,
        reducer: Reducer,
        limit: float | None,
        scaler: guards.LossScale | None,
        *,
        name: Callable[[int], str],
    ) -> list[Batch] | None:
        """Step every tensor once; None where GradScaler calls the step off."""
        batches = self._gatherer.batches(param_groups, states, reducer, name=name)
        guards.require_one_device(batches)
        left = batches
        if limit is None and scaler is None and isinstance(reducer, LocalReducer):
            left = self._take_whole_steps(batches)
        # Not by what this rank has gradients of: all must take as many reductions.
        if self._is_coupled(param_groups) and (limit is not None or scaler is not None):
            self._scale_first(left, reducer, param_groups, limit, scaler, name=name)
        else:
            self._reduce(left, reducer, param_groups, needs_norms=limit is not None or scaler is not None)
            guards.scale(left, limit, scaler)
        if scaler is not None and scaler.calls_off(left, is_sharded=not isinstance(reducer, LocalReducer)):
            return None
        guards.refuse_nonfinite(left, name)
        for together in _by_device(left):
            guards.leave_out_nonfinite(together, self._telemetry)
            shared = _shared_sums(together)
            for batch in together:
                batch.advance(shared if batch.options.scope == "model" else None)
        for batch in batches:
            batch.packed.store()
        return batches

    def _is_coupled(self, param_groups: ParamGroups) -> bool:
        """Whether a weight decay is added to gradients."""
        return self._family.coupled and any(group["weight_decay"] for group in param_groups)

    def _take_whole_steps(self, batches: list[Batch]) -> list[Batch]:
        """Let backends step by themselves what depends on nothing else, and return the batches that are left."""
        if any(batch.options.nonfinite == "raise" for batch in batches):  # before anything is changed
            return batches
        left = []
        for batch in batches:
            report = None
            if batch.options.scope == "tensor":
                report = batch.backend.whole_step(
                    batch.tensors,
                    batch.packed.matrix,
                    adaptive="exp_avg_scale" in batch.keys,
                    skip_nonfinite=batch.options.nonfinite == "skip",
                    skipped=self._telemetry.skipped_on(batch.device),
                )
            if report is None:
                left.append(batch)
            else:
                batch.set_report(report)
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
                batch.set_sums(sums, None)
            return
        params = (param for group in param_groups for param in group["params"] if param is not None)
        device = next((param.device for param in params), torch.device("cpu"))
        nothing = torch.zeros(0, update.NUM_SUMS, dtype=update.accumulator_dtype(device), device=device)
        reduced = reducer.reduce(
            torch.cat([nothing, *(rows.to(device, nothing.dtype) for rows in local)]),
            [index for batch in batches for index in batch.indices],
            present=[is_present for batch in batches for is_present in batch.present],
        )
        sizes = [len(batch) for batch in batches]
        marks = [None] * len(batches) if reduced.present is None else torch.split(reduced.present, sizes)
        for batch, sums, mark in zip(batches, torch.split(reduced.sums, sizes), marks, strict=True):
            batch.set_sums(sums.to(batch.device), None if mark is None else mark.to(batch.device))

    def _scale_first(
        self,
        batches: list[Batch],
        reducer: Reducer,
        param_groups: ParamGroups,
        limit: float | None,
        scaler: guards.LossScale | None,
        *,
        name: Callable[[int], str],
    ) -> None:
        """Scale the gradients themselves, to which a coupled decay is added, before their sums are taken."""
        self._reduce(batches, reducer, param_groups, needs_norms=True, only_norms=True)
        guards.scale(batches, limit, scaler)
        if scaler is None:
            guards.refuse_nonfinite(batches, name)
        squares = [batch.raw_grad_sq for batch in batches]
        for batch in batches:
            batch.scale_grads_now()
        self._reduce(batches, reducer, param_groups, needs_norms=True)
        for batch, square in zip(batches, squares, strict=True):  # reported is the norm before clipping
            batch.sums[:, -1] = square


def _by_device(batches: Sequence[Batch]) -> Iterable[list[Batch]]:
    together: defaultdict[torch.device, list[Batch]] = defaultdict(list)
    for batch in batches:
        together[batch.device].append(batch)
    return together.values()


def _shared_sums(batches: Sequence[Batch]) -> Tensor | None:
    """The sums of the one angle of scope "model", shape (3,)."""
    sums = [
        update.shared_sums(batch.angle_sums(), batch.scalars.get("exp_avg_scale"), batch.numbers)
        for batch in batches
        if batch.options.scope == "model"
    ]
    return torch.stack(sums).sum(0) if sums else None


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
    flags = [(batch.raw_grad_sq == 0.0).all() for batch in batches]
    flags += [rate.reshape(()) == 0.0 for rate in rates if isinstance(rate, Tensor)]
    idle = torch.stack([flag.to(batches[0].device) for flag in flags]).all()
    for batch in batches:
        batch.scale_state(~idle)
