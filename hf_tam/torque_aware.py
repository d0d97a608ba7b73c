"""The base of the torque-aware optimizers: parameters, sums, angles, skips and statistics."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from hf_tam import checkpoint
from hf_tam.family import Family
from hf_tam.hyperparameters import plain_numbers, validate, validate_step_size
from hf_tam.integrations.torch_private import is_flat, is_sliced
from hf_tam.sharding import Agreement, LogicalTensors, Reducer, Stepped, device_of
from hf_tam.step import buffers, guards
from hf_tam.step.pipeline import Pipeline
from hf_tam.step.telemetry import Telemetry

_ADDED = {"max_grad_norm": None, "param_correction": None, "state_bits": None}
"""Hyperparameters that a pickle of an earlier version lacks, with what that did."""


class TorqueAware(Optimizer, ABC):
    """What AdaTAMW, AdaTAM and TAM share. Not to be used by itself.

    A step takes the partial sums of every tensor, makes them those of whole logical tensors, turns them into one
    angle a tensor (or one for all), and hands each tensor's coefficients to a backend. On an accelerator, or with
    `capturable`, no number of it is ever read by the host.

    Attributes:
        logical: Which tensors its parameters are, and how they are kept; for checkpoints, not for users.
        agreement: What was agreed on with other ranks; likewise.
    """

    step_sizes: ClassVar[tuple[str, ...]]
    """Accepted values of `step_size`."""
    family: ClassVar[Family]
    """Its states and its numbers."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check `defaults`, then hand over to torch.optim.Optimizer."""
        defaults = {**defaults, **plain_numbers(defaults)}
        validate(defaults)
        validate_step_size(defaults["step_size"], self.step_sizes)
        # First, for torch's constructor calls `add_param_group`.
        self._reset_runtime()
        super().__init__(params, defaults)

    def _reset_runtime(self) -> None:
        self.logical = LogicalTensors()
        self.agreement = Agreement()
        self._telemetry = Telemetry()
        self._just_loaded = False
        self._pipeline = Pipeline(self.family, self._telemetry)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, which may override any hyperparameter. No communication.

        Raises:
            ValueError: A hyperparameter is out of range, or a parameter is already in a group.
        """
        if isinstance(param_group, dict):  # otherwise torch says what it should be
            param_group.update(plain_numbers(param_group))
            merged = {**self.defaults, **param_group}
            validate(merged)
            validate_step_size(merged["step_size"], self.step_sizes)
        super().add_param_group(param_group)
        self.logical.add_group(self.param_groups[-1])

    def attach(self, module: nn.Module, *, whole: bool = False) -> None:
        """Tell the optimizer which module owns its parameters. Idempotent, no communication.

        Needed under FSDP1 and DeepSpeed ZeRO, where only the module leads to how its parameters are cut (the Trainer,
        `Accelerator.prepare` and `deepspeed.initialize` call it); optional otherwise. An optimizer over several
        modules is attached to each.

        The names of the parameters become known to `torque_stats`, and a parameter that was replaced after the
        optimizer was built is accepted again if it is the module's. The module is not kept alive.

        Args:
            module: The model, wrapped or not.
            whole: No other rank holds a part of this model. With scope "model" or `max_grad_norm` the ranks of a job
                are compared, and refused where they step different parameters; ranks that train models of their own
                (an actor here, a critic there) say so by this.

        Raises:
            ValueError: The module owns none of the optimizer's parameters, or is tensor-parallel over plain tensors.
            RuntimeError: A parameter says that it is a part of a tensor, or is in a flat parameter of FSDP1's.
        """
        self.logical.attach(module, self.param_groups)
        self.agreement.alone |= whole

    def torque_stats(self) -> dict[str, Any]:
        """What the last step saw. No communication, and no host synchronisation until somebody reads a number.

        Returns:
            A dict. `cosine`, `torque` and `damping`: 1-D fp32 tensors with one entry a logical parameter tensor, in
            param_groups order; a tensor without a gradient in the last step has cosine 0 and damping (1 + torque) / 2.
            After a load under FSDP1, torque and damping are NaN on a rank that holds nothing of a tensor, until the
            next step. `effective_lr`: 1-D fp32, lr * 2 * c_t in the calibrated forms (c = 1/2 is AdamW or SGD), lr *
            c_t in the paper's; NaN for a tensor that took no step in the last one. `names`: the parameters' names,
            None where unknown. `grad_norm`: 0-d fp32, the global norm of the raw gradients as the step saw them (NaN
            before the first step, and where nothing needed it any more); `grad_norms`: 1-D fp32, that of each tensor.
            `skipped`: 0-d int64, how many updates `nonfinite="skip"` has left out so far: tensors with scope "tensor",
            whole steps with scope "model".
        """
        return self._telemetry.stats(
            self._torques(),
            names=self._names(),
            device=device_of(self._params()),
            moved=self.logical.moved_since_the_step(self.param_groups),
        )

    def promise_grad_norm(self) -> Tensor:
        """The norm of the next step's gradients, before clipping, for who must hold it before the step is taken.

        No communication, and no host synchronisation.

        Returns:
            A new 0-d fp32 tensor, NaN until the next step fills it with `torque_stats()["grad_norm"]`. It stays NaN
            where that step is not taken, as torch.amp.GradScaler decides, or raises.
        """
        return self._telemetry.promise(device_of(self._params()))

    def _torques(self) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The torque states that there are, each 1-D, with the positions of their logical tensors; the last counts."""
        if not self.logical.is_partitioned(self.param_groups):
            for index, param in enumerate(self._params()):
                if param in self.state and "torque" in self.state[param]:
                    yield [index], self.state[param]["torque"].reshape(1)
                elif self._just_loaded and is_sliced(param):  # the next step tells this rank
                    yield [index], torch.full((1,), torch.nan)
            return
        for table in (group[buffers.TABLE]["torque"] for group in self.param_groups if buffers.TABLE in group):
            yield range(len(table)), table.nan_to_num(0.0)
        for buffer, indices in self.logical.buffers(self.state):
            if self.state[buffer]["torque"].ndim == 1:
                yield indices, self.state[buffer]["torque"]

    @property
    def skipped(self) -> int:
        """How many updates were skipped so far; see `torque_stats`. Reading it waits for an accelerator."""
        return self._telemetry.read_skipped()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Communication: none on one device and under DDP. With sharded parameters one all-reduce for each group of ranks
        over which they are cut, of 32 bytes a parameter tensor and 32 more; every rank of a group must call step().
        At the first step, and where a rank's parameters or arguments have changed, also what `Agreement.settle` says.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: A parameter is kept in a way that is not known, is on the meta device, or has a sparse
                gradient; or the ranks hold different parameters, or would do different things with them.
            FloatingPointError: A gradient is not finite and `nonfinite="raise"`; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    # Under torch.compile(optimizer.step) this part runs as it is: the fused kernels are opaque to a compiler, and
    # reading scalars on the host would break the graph at every tensor and recompile at every new learning rate.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _advance(self) -> None:
        groups = self.param_groups
        params = [param for group in groups for param in group["params"]]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            reducer = self._agree_on_reducer(params)
        else:
            reducer = self.logical.select(params, groups)
        if not reducer.sees_all:
            self._refuse_shared_angle()
        if not self.state:
            self._refuse_corrections()
        # Not in load_state_dict, which communicates as little as torch's: it is at a step that all ranks come.
        if self._just_loaded:
            checkpoint.share_scalars(self, reducer)
            self._just_loaded = False
        # GradScaler sets the two attributes before step() and deletes them after it (torch/amp/grad_scaler.py).
        found_inf, grad_scale, scaling = getattr(self, "found_inf", None), getattr(self, "grad_scale", None), None
        if (
            found_inf is not None
            or grad_scale is not None
            or any(group["max_grad_norm"] is not None for group in groups)
        ):
            scaling = guards.Scaling(self._max_grad_norm(), found_inf, grad_scale)
        repeats = self.logical.repeats
        self._pipeline.step(groups, self.state, reducer, name=self._describe, scaling=scaling, repeats=repeats)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to step(); as torch.optim, where `fused=True`.

        GradScaler then sets the attributes `found_inf` and `grad_scale`, which step() heeds in any case, and does not
        wait for the accelerator. Frameworks that clip between the two refuse an optimizer that says so (Lightning).
        """
        return any(group.get("fused") for group in self.param_groups)

    def _agree_on_reducer(self, params: list[Tensor]) -> Reducer:
        """The reducer, where there are other ranks, which must step the same."""
        with self.agreement.telling(params):
            reducer = self.logical.select(params, self.param_groups)
        loaded, fresh = self._just_loaded, not self.state
        self.agreement.settle(Stepped(reducer, self.param_groups, self.coupled, loaded, fresh))
        return reducer

    def _refuse_shared_angle(self) -> None:
        if any(group["scope"] == "model" for group in self.param_groups):
            raise RuntimeError(
                "scope='model' takes one angle over all parameters, but DeepSpeed hands over a part of them at a time "
                "(a param group under ZeRO-1 and 2, a sub-group under ZeRO-3): use scope='tensor', or one param group "
                "and a sub_group_size larger than the model"
            )

    def _refuse_corrections(self) -> None:
        """Where they could not be saved."""
        for group in self.param_groups:
            for param in group["params"] if group["param_correction"] is not None else ():
                if param.dtype != torch.bfloat16:
                    continue
                # One dtype of all states of a unit (torch 2.13, fsdp/_optim_utils.py, _convert_all_state_info).
                if (is_sliced(param) or is_flat(param)) and group["state_bits"] == 32:
                    keeper = "FSDP1 saves states of one dtype only: leave out state_bits=32, or use FSDP2"
                elif self.logical.is_partitioned(self.param_groups):
                    keeper = "DeepSpeed ZeRO's flat buffers keep fp32 weights themselves: train those"
                else:
                    continue
                raise RuntimeError(
                    f"param_correction={group['param_correction']!r} cannot be used here: {keeper}, or leave it out "
                    "and train fp32 weights under bf16 mixed precision"
                )

    def _max_grad_norm(self) -> float | None:
        limit = guards.common_limit(self.param_groups)
        if limit is not None and self.logical.is_partitioned(self.param_groups):
            raise RuntimeError(
                f"max_grad_norm={limit} cannot be used with DeepSpeed ZeRO, which hands over a part of the gradients "
                "at a time and clips them itself: pass max_grad_norm=None, and set gradient_clipping in its config"
            )
        return limit

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _names(self) -> list[str | None]:
        return self.logical.names(self.param_groups)

    def _describe(self, position: int) -> str:
        """The name of a logical tensor, or which one it is."""
        return self._names()[position] or f"number {position}"

    @property
    def moments(self) -> tuple[str, ...]:
        """State keys of the moments, which have the parameter's shape and, without `state_bits`, its dtype."""
        return self.family.moments

    @property
    def scalar_states(self) -> tuple[str, ...]:
        """State keys that hold one fp32 number a tensor."""
        return self.family.scalar_states

    @property
    def coupled(self) -> bool:
        """Whether weight decay is part of the gradient."""
        return self.family.coupled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of its torch.optim counterpart. No communication.

        torch.optim.AdamW's state (for AdaTAM Adam's, for TAM SGD's) is taken over exactly, with the torque at 0.
        `foreach`, `fused`, `capturable`, `max_grad_norm`, `param_correction` and `state_bits` stay the constructor's,
        and states are converted to them; other hyperparameters are the saved ones, with a warning where that overrides
        a requested value: for what a schedule moves, another one to
        start from (`initial_lr`). A learning rate that no scheduler has noted is the saved one without a word.

        What else stands in states, groups and beside the parameters is kept, and saved again. Moments are shared with
        `state_dict` where dtype and device allow, as torch.optim shares them: what is to be loaded twice must be
        copied before (copy.deepcopy), and a second load without that warns.

        Raises:
            ValueError: Another optimizer's state, AMSGrad's, quantised moments, or tensors of other shapes than the
                parameters'; the message names the parameter.
        """
        loaded: list[checkpoint.Adapted] = []

        def adapt(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.append(checkpoint.adapt(self, saved))
            return loaded[-1].state_dict

        # Hooks, so that the user's own pre-hooks run before ours and the post-hooks after.
        before = self.register_load_state_dict_pre_hook(adapt)
        after = self.register_load_state_dict_post_hook(lambda _: checkpoint.restore(self, loaded[-1]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self._just_loaded = True
        self._telemetry.forget()  # the last step was another run's

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. Waits for an accelerator once, to warn of skipped updates. No communication.

        With DTensor parameters every parameter has a state, one of zeros where no step was taken yet: a checkpoint
        that lacks some cannot be loaded by torch.distributed.checkpoint. With whole parameters only those that took a
        step have one, as with torch.optim; DefaultLoadPlanner(allow_partial_load=True) and
        StateDictOptions(strict=False) load such a checkpoint, exactly, where all are asked for.
        """
        self._telemetry.read_skipped()
        self._pipeline.vanishing.say()
        # Before the user's own, which may wrap and rename.
        ours = self.register_state_dict_post_hook(lambda _, packed: checkpoint.finish(self, packed), prepend=True)
        try:
            return super().state_dict()
        finally:
            ours.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or deepcopy (everything), or from load_state_dict (state and groups)."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch.optim.Optimizer puts there (torch 2.13)
        for key, value in _ADDED.items():
            self.defaults.setdefault(key, value)
        # torch pickles defaults, state and param_groups alone. load_state_dict comes here as well, and must leave the
        # rest, which knows the attached modules, as it is.
        if "logical" not in self.__dict__:
            self._reset_runtime()
            for group in self.param_groups:
                self.logical.add_group(group)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
