"""The base of the torque-aware optimizers: parameters, sums, angles, skips and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from hf_tam import buffers, checkpoint, clipping, nonfinite, update
from hf_tam.backends import NUM_SUMS
from hf_tam.backends.whole import AdamStep, SgdStep
from hf_tam.bucket import Bucket
from hf_tam.gathering import Gatherer
from hf_tam.hyperparameters import validate, validate_step_size
from hf_tam.logical import LogicalTensors
from hf_tam.sharding import Agreement, LocalReducer, Reducer, Span, Stepped
from hf_tam.telemetry import Telemetry


class TorqueAware(Optimizer, ABC):
    """What AdaTAMW, AdaTAM and TAM share. Not to be used by itself.

    A step takes the partial sums of every tensor, makes them those of whole logical tensors, turns them into one
    angle a tensor (or one for all), and hands each tensor's coefficients to a backend. On an accelerator, or with
    `capturable`, no number of it is ever read by the host.
    """

    step_sizes: ClassVar[tuple[str, ...]]
    """Accepted values of `step_size`."""
    moments: ClassVar[tuple[str, ...]]
    """State keys of the moments, which have the parameter's shape and dtype."""
    scalar_states: ClassVar[tuple[str, ...]]
    """State keys that hold one fp32 number a tensor."""
    coupled: ClassVar[bool]
    """Whether weight decay is part of the gradient."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check `defaults`, then hand over to torch.optim.Optimizer."""
        validate(defaults)
        validate_step_size(defaults["step_size"], self.step_sizes)
        self._reset_runtime()
        super().__init__(params, defaults)

    def _reset_runtime(self) -> None:
        self._logical = LogicalTensors()
        self._agreement = Agreement()
        self._telemetry = Telemetry()
        self._just_loaded = False
        self._gatherer = Gatherer()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, which may override any hyperparameter. No communication.

        Raises:
            ValueError: A hyperparameter is out of range, or a parameter is already in a group.
        """
        if isinstance(param_group, dict):  # otherwise torch says what it should be
            merged = {**self.defaults, **param_group}
            validate(merged)
            validate_step_size(merged["step_size"], self.step_sizes)
        super().add_param_group(param_group)
        self._logical.add_group(self.param_groups[-1])

    def attach(self, module: nn.Module, *, whole: bool = False) -> None:
        """Tell the optimizer which module owns its parameters. Idempotent, no communication.

        Needed under FSDP1, where only the module knows how its parameters are cut; optional otherwise.

        The names of the parameters become known to `torque_stats`, and a parameter that was replaced after the
        optimizer was built is accepted again if it is the module's.

        Args:
            module: The model, wrapped or not.
            whole: No other rank holds a part of this model. With scope "model" or `max_grad_norm` the ranks of a job
                are compared, and refused where they step different parameters; ranks that train models of their own
                (an actor here, a critic there) say so by this.

        Raises:
            ValueError: The module owns none of the optimizer's parameters.
        """
        self._logical.attach(module, list(self._params()))
        self._agreement.alone |= whole

    def torque_stats(self) -> dict[str, Any]:
        """What the last step saw. No communication, and no host synchronisation until somebody reads a number.

        Returns:
            A dict. `cosine`, `torque` and `damping`: 1-D fp32 tensors with one entry a logical parameter tensor, in
            param_groups order; a tensor without a gradient in the last step has cosine 0 and damping (1 + torque) / 2.
            `effective_lr`: 1-D fp32, lr * 2 * c_t in the calibrated forms (c = 1/2 is AdamW or SGD), lr * c_t in the
            paper's; NaN for a tensor that took no step in the last one. `names`: the parameters' names, None where
            unknown. `grad_norm`: 0-d fp32, the global norm of the raw gradients as the step saw them (NaN before the
            first step, and where nothing needed it any more); `grad_norms`: 1-D fp32, that of each tensor.
            `skipped`: 0-d int64, how many updates `nonfinite="skip"` has left out so far: tensors with scope
            "tensor", whole steps with scope "model".
        """
        names = self._names()
        device = next((param.device for param in self._params()), torch.device("cpu"))
        return self._telemetry.stats(self._torques(), names=names, device=device)

    def promise_grad_norm(self) -> Tensor:
        """The norm of the next step's gradients, before clipping, for who must hold it before the step is taken.

        No communication, and no host synchronisation.

        Returns:
            A new 0-d fp32 tensor, NaN until the next step fills it with `torque_stats()["grad_norm"]`. It stays NaN
            where that step is not taken, as torch.amp.GradScaler decides, or raises.
        """
        return self._telemetry.promise(next((param.device for param in self._params()), torch.device("cpu")))

    def _torques(self) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The torque states that there are, each 1-D, with the positions of their logical tensors; the last counts."""
        if not self._logical.is_partitioned(self.param_groups):
            for index, param in enumerate(self._params()):
                if param in self.state and "torque" in self.state[param]:
                    yield [index], self.state[param]["torque"].reshape(1)
            return
        for table in (group[buffers.TABLE]["torque"] for group in self.param_groups if buffers.TABLE in group):
            yield range(len(table)), table.nan_to_num(0.0)
        for buffer, indices in self._logical.buffers():
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
        reducer = self._select_reducer()
        if self._just_loaded:
            checkpoint.share_scalars(self, reducer)
            self._just_loaded = False
        had_state = bool(self.state)
        buckets = self._gatherer.buckets(self, reducer)
        self._check_devices(buckets)
        self._telemetry.start(reducer)
        limit = self._max_grad_norm()
        everything, buckets = buckets, self._take_whole_steps(reducer, buckets, limit)
        # Not by what this rank has gradients of: all must take as many reductions.
        if limit is not None and self.coupled and any(group["weight_decay"] for group in self.param_groups):
            self._reduce_clipped(reducer, buckets, limit)
            limit = None
        else:
            self._reduce(reducer, buckets)
        nonfinite.refuse(buckets, self._names)
        if limit is not None:
            clipping.set_factors(buckets, limit)
        devices: defaultdict[torch.device, list[Bucket]] = defaultdict(list)
        for bucket in buckets:
            devices[bucket.device].append(bucket)
        for together in devices.values():
            nonfinite.skip(together, self._telemetry)
            self._angles(together)
        self._telemetry.record(reducer, everything)
        self._forget_initialisation(everything, had_state=had_state)
        self._gatherer.forget_gradients()

    def _forget_initialisation(self, buckets: list[Bucket], *, had_state: bool) -> None:
        """Undo a step that was taken only to create state.

        torch.distributed.checkpoint's state-dict helpers step once with lr = 0 and zero gradients, and leave step = 1
        behind (https://github.com/pytorch/pytorch/issues/164929); training would not be the same afterwards.
        """
        rates = [bucket.group["lr"] for bucket in buckets]
        if (
            had_state
            or not all(bucket.measured for bucket in buckets)
            or not buckets
            or any(not isinstance(rate, Tensor) and rate != 0.0 for rate in rates)
            # DeepSpeed's groups come one at a time: LoRA's A matrices, whose first gradients are 0, may come alone.
            or self._logical.is_partitioned(self.param_groups)
        ):
            return
        flags = [(bucket.raw_grad_sq == 0.0).all() for bucket in buckets]
        flags += [rate.reshape(()) == 0.0 for rate in rates if isinstance(rate, Tensor)]
        idle = torch.stack([flag.to(buckets[0].device) for flag in flags]).all()
        for bucket in buckets:
            bucket.scale_state((~idle).to(bucket.device))

    def _select_reducer(self) -> Reducer:
        params = list(self._params())
        with self._agreement.telling(params, NUM_SUMS):
            reducer = self._logical.select(params, self.param_groups)
        loaded, fresh = self._just_loaded, not self.state
        self._agreement.settle(Stepped(reducer, self.param_groups, self.coupled, loaded, fresh, NUM_SUMS))
        if not reducer.sees_all and any(group["scope"] == "model" for group in self.param_groups):
            raise RuntimeError(
                "scope='model' takes one angle over all parameters, but DeepSpeed hands over a part of them at a time "
                "(a param group under ZeRO-1 and 2, a sub-group under ZeRO-3): use scope='tensor', or one param group "
                "and a sub_group_size larger than the model"
            )
        return reducer

    def _take_whole_steps(self, reducer: Reducer, buckets: list[Bucket], limit: float | None) -> list[Bucket]:
        """Let backends step by themselves what depends on nothing else, and return the buckets that are left."""
        if (
            limit is not None
            or not isinstance(reducer, LocalReducer)
            or any(group["nonfinite"] == "raise" for group in self.param_groups)
        ):
            return buckets
        left = []
        for bucket in buckets:
            report = None
            if bucket.group["scope"] == "tensor":
                skipped = self._telemetry.skipped_on(bucket.device)
                step = self._whole_step(bucket)
                report = bucket.backend.whole_step(bucket.entries, bucket.matrix, step, skipped=skipped)
            if report is None:
                left.append(bucket)
                continue
            bucket.set_report(report)
            if bucket.on_host:
                self._telemetry.read_skipped()
        return left

    def _max_grad_norm(self) -> float | None:
        limit = clipping.common_limit(self.param_groups)
        if limit is not None and self._logical.is_partitioned(self.param_groups):
            raise RuntimeError(
                f"max_grad_norm={limit} cannot be used with DeepSpeed ZeRO, which hands over a part of the gradients "
                "at a time and clips them itself: pass max_grad_norm=None, and set gradient_clipping in its config"
            )
        return limit

    def _reduce_clipped(self, reducer: Reducer, buckets: list[Bucket], limit: float) -> None:
        """Clip the gradients themselves, to which a coupled decay is added, before their sums are taken."""
        self._reduce(reducer, buckets, only_norms=True)
        nonfinite.refuse(buckets, self._names)
        clipping.set_factors(buckets, limit)
        squares = [bucket.raw_grad_sq for bucket in buckets]
        for bucket in buckets:
            assert bucket.clip is not None
            for entry in bucket.entries:
                entry.raw_grad.mul_(bucket.clip)
            bucket.clip = None
        self._reduce(reducer, buckets)
        for bucket, square in zip(buckets, squares, strict=True):  # reported is the norm before clipping
            bucket.sums[:, -1] = square

    def _reduce(self, reducer: Reducer, buckets: list[Bucket], *, only_norms: bool = False) -> None:
        """Take the partial sums and make them global: once a step on every rank, whatever this rank holds.

        Args:
            reducer: Makes them global.
            buckets: The tensors.
            only_norms: Leave the angles out.
        """
        shared = any(bucket.group["scope"] == "model" and bucket.any_active() for bucket in buckets)
        local = [
            bucket.take_sums(with_dot=shared and bucket.group["scope"] == "model", only_norms=only_norms)
            for bucket in buckets
        ]
        if isinstance(reducer, LocalReducer):
            for bucket, sums in zip(buckets, local, strict=True):
                bucket.set_sums(sums, None)
            return
        entries = [entry for bucket in buckets for entry in bucket.entries]
        device = next((param.device for param in self._params()), torch.device("cpu"))
        nothing = torch.zeros(0, NUM_SUMS, dtype=update.accumulator_dtype(device), device=device)
        reduced = reducer.reduce(
            torch.cat([nothing, *(rows.to(device, nothing.dtype) for rows in local)]),
            [entry.index for entry in entries],
            present=[entry.owner.grad is not None for entry in entries],
        )
        sizes = [len(bucket.entries) for bucket in buckets]
        marks = [None] * len(buckets) if reduced.present is None else torch.split(reduced.present, sizes)
        for bucket, sums, mark in zip(buckets, torch.split(reduced.sums, sizes), marks, strict=True):
            bucket.set_sums(sums.to(bucket.device), None if mark is None else mark.to(bucket.device))

    def _angles(self, buckets: list[Bucket]) -> None:
        """One step for the tensors on one device: a cosine each, or one for all of scope "model"."""
        together = [self._model_sums(bucket) for bucket in buckets if bucket.group["scope"] == "model"]
        shared = update.cosine(*torch.stack(together).sum(0).unbind()) if together else None
        for bucket in buckets:
            if shared is not None and bucket.group["scope"] == "model":
                self._update(bucket, shared.expand(len(bucket.entries)))
            else:
                self._update(bucket, update.cosine(*bucket.angle_sums()))

    def _model_sums(self, bucket: Bucket) -> Tensor:
        """<m, g>, |m|^2 and |g|^2 of all tensors of a bucket together, for the paper's m, shape (3,)."""
        scale = self._moment_scale(bucket)
        dot, momentum_sq, grad_sq = bucket.angle_sums()
        return torch.stack([dot * scale, momentum_sq * scale.square(), grad_sq]).sum(1)

    def _init_state(self, param: Tensor, state: dict[str, Any], spans: Sequence[Span] | None) -> None:
        # Scalars lie beside the parameter: a skipped step must leave `step` alone without the host knowing.
        shape = () if spans is None else (len(spans),)
        for key in self.scalar_states:
            state[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        for key in self.moments:
            state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def _check_devices(self, buckets: list[Bucket]) -> None:
        shared = {bucket.device for bucket in buckets if bucket.group["scope"] == "model"}
        if len(shared) > 1:
            names = ", ".join(sorted(map(str, shared)))
            raise RuntimeError(
                f"scope='model' takes one angle over all parameters, which lie on several devices here ({names}); "
                "use scope='tensor', or put the model on one device"
            )

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _names(self) -> list[str | None]:
        return self._logical.names(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of its torch.optim counterpart. No communication.

        torch.optim.AdamW's state (for AdaTAM Adam's, for TAM SGD's) is taken over exactly, with the torque at 0.
        `foreach`, `fused` and `capturable` stay the constructor's; other hyperparameters are the saved ones, with a
        warning where that overrides a requested value.

        Raises:
            ValueError: Another optimizer's state, AMSGrad's, or tensors of other shapes than the parameters'.
        """
        saved: dict[str, Any] = {}

        def adapt(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            saved.update(checkpoint.adapt(self, loaded))
            return saved

        # Hooks, so that the user's own pre-hooks run before ours and the post-hooks after.
        before = self.register_load_state_dict_pre_hook(adapt)
        after = self.register_load_state_dict_post_hook(
            lambda _: checkpoint.restore_scalars(self, saved), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        self._just_loaded = True

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. Waits for an accelerator once, to warn of skipped updates. No communication.

        With DTensor parameters every parameter has a state, one of zeros where no step was taken yet: a checkpoint
        that lacks some cannot be loaded by torch.distributed.checkpoint.
        """
        self._telemetry.read_skipped()
        packed = super().state_dict()
        if self._logical.is_partitioned(self.param_groups):
            stepped = [(self.state[buffer], indices) for buffer, indices in self._logical.buffers()]
            buffers.save_table(packed, stepped, count=len(self._names()), scalar_states=self.scalar_states)
            return packed
        return checkpoint.complete(self, packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or deepcopy (everything), or from load_state_dict (state and groups)."""
        super().__setstate__(state)
        if "_logical" not in self.__dict__:
            self._reset_runtime()
            for group in self.param_groups:
                self._logical.add_group(group)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch.optim.Optimizer.__setstate__ puts it in our defaults
                    group.setdefault(key, value)

    @abstractmethod
    def _update(self, bucket: Bucket, cosine: Tensor) -> None:
        """Take the step of one bucket, whose tensors have the cosines `cosine`, shape (n,)."""

    @abstractmethod
    def _whole_step(self, bucket: Bucket) -> AdamStep | SgdStep:
        """The hyperparameters of the step of one bucket, for a backend that takes it whole."""

    @abstractmethod
    def _moment_scale(self, bucket: Bucket) -> Tensor:
        """The factor that makes the stored first moment the paper's m, shape (n,)."""
