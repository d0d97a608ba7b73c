"""Between our state_dicts and those of torch.optim: which are accepted, and how they are taken over.

In AdamW's terms m = exp_avg / (2 (1 - beta1)), in SGD's m = momentum_buffer / 2: the factor that makes a neutral angle
(c = 1/2) plain AdamW or SGD. With step_size="adamw" or "sgd" our moment is theirs; with "paper" it is m itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from copy import deepcopy
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tam.family import CORRECTION, Member, is_corrected, moment_dtype
from hf_tam.saved_groups import adapt_group, is_literal, refuse_others
from hf_tam.sharding import Reducer, device_of
from hf_tam.step import buffers
from hf_tam.step.buffers import TABLE
from hf_tam.update import moment_unit


class Adapted(NamedTuple):
    """A state_dict in an optimizer's own form.

    Attributes:
        state_dict: What torch.optim.Optimizer.load_state_dict is given.
        kept: What that must not cast: by the key of the parameter, and by that of the state.
    """

    state_dict: dict[str, Any]
    kept: dict[Hashable, dict[str, Any]]


def adapt(optimizer: Member, state_dict: dict[str, Any]) -> Adapted:
    """A copy of `state_dict` in `optimizer`'s own form, checked against its parameters.

    Tensors are shared, not copied. What is neither state nor hyperparameter of ours stays where it is.

    Raises:
        ValueError: The state is another optimizer's, AMSGrad's, Nesterov's, or has other shapes than the parameters.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"not the state_dict of an optimizer: it holds {sorted(map(str, state_dict))}")
    # Groups are copied and states are not, as in torch.optim.Optimizer.load_state_dict: groups are written to below.
    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    _require_lengths([len(group["params"]) for group in groups], [len(group["params"]) for group in saved_groups])
    source: Mapping[Hashable, Any] = state_dict["state"]
    states: dict[Hashable, dict[str, Any]] = {}
    kept: dict[Hashable, dict[str, Any]] = {}
    unused: dict[str, str] = {}
    overtaken: str | None = None
    # Under ZeRO a buffer has no name of its own.
    names = repeat(None) if optimizer.logical.is_partitioned(groups) else iter(optimizer.logical.names(groups))
    for group, saved in zip(groups, saved_groups, strict=True):
        refuse_others(optimizer, saved)
        literal = is_literal(optimizer, group, saved)
        adapter = _StateAdapter(optimizer, group, {**group, **saved}, literal=literal, from_table=TABLE in saved)
        for key, param in zip(saved["params"], group["params"], strict=True):
            where = _describe(next(names), key, param)
            if key in source and key not in states:  # a parameter may stand in the groups twice
                states[key], kept[key] = adapter.adapt(source[key], param, where)
                if overtaken is None and _has_gone_on(optimizer, source[key], param):
                    overtaken = where
                for foreign in source[key].keys() - adapter.known if "torque" not in source[key] else ():
                    unused.setdefault(foreign, where)
    for group, saved in zip(groups, saved_groups, strict=True):
        adapt_group(optimizer, group, saved)
    if overtaken is not None:
        warnings.warn(
            f"this state_dict was loaded before, and the moments in it (of {overtaken}, first) are those that the "
            "optimizer has stepped since, as torch.optim shares them too: it is no way back. Load copy.deepcopy of a "
            "state_dict that is to be loaded again",
            UserWarning,
            stacklevel=2,
        )
    if unused:
        warnings.warn(
            f"the saved state of {next(iter(unused.values()))} holds {sorted(map(str, unused))} besides what "
            f"{type(optimizer).__name__}'s torch.optim counterpart keeps: it is loaded and saved again, and not used",
            UserWarning,
            stacklevel=2,
        )
    return Adapted({**state_dict, "state": {**source, **states}, "param_groups": saved_groups}, kept)


def _has_gone_on(optimizer: Member, saved: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a saved state holds the moments of a parameter as they are now, and is of another step."""
    state = optimizer.state.get(param, {})
    if not any(state.get(key) is not None and saved.get(key) is state[key] for key in optimizer.family.moments):
        return False
    return saved.get("step") is not None and float(saved["step"]) != float(state.get("step", 0.0))


def adapt_groups(optimizer: Member, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of saved param groups in `optimizer`'s own form, for who loads the states by other ways than `adapt`.

    Args:
        optimizer: Not changed.
        groups: As many as it has.

    Raises:
        ValueError: They are another optimizer's.
    """
    adapted = deepcopy(groups)
    for group, saved in zip(optimizer.param_groups, adapted, strict=True):
        refuse_others(optimizer, saved)
        adapt_group(optimizer, group, saved)
    return adapted


def _require_lengths(here: list[int], saved: list[int]) -> None:
    if here == saved:
        return
    what = "has a different number of parameter groups"  # in torch's words
    if len(here) == len(saved):
        what = "contains a parameter group that doesn't match the size of optimizer's group"
    raise ValueError(
        f"loaded state dict {what} (saved: {saved} tensors, here: {here}): it belongs to another "
        "model, or to other trainable parameters"
    )


def params_of(optimizer: Member) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def _describe(name: str | None, key: Hashable, param: Tensor) -> str:
    return f"parameter {name if name is not None else key} (shape {tuple(param.shape)})"


class _StateAdapter:
    """Makes the states of one saved param group ours.

    Args:
        optimizer: Whose they become.
        requested: The group that the saved one replaces.
        group: The saved group, completed by that.
        literal: Whether the moments are to be the paper's own.
        from_table: Whether a table in the saved group has the scalar states.
    """

    def __init__(
        self,
        optimizer: Member,
        requested: dict[str, Any],
        group: dict[str, Any],
        *,
        literal: bool,
        from_table: bool,
    ) -> None:
        self._name, self._moments = type(optimizer).__name__, optimizer.family.moments
        self._literal, self._from_table = literal, from_table
        self._flat = optimizer.logical.is_partitioned(optimizer.param_groups)
        self._defaults = optimizer.family.foreign_scalars({**group, "step_size": "paper" if literal else "adamw"})
        self._adaptive, self._requested = "exp_avg" in optimizer.family.moments, requested
        self.known = {*optimizer.family.moments, *optimizer.family.scalar_states, CORRECTION}

    def adapt(self, state: Mapping[str, Any], param: Tensor, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state for torch.optim.Optimizer.load_state_dict, and what of it that must not cast."""
        if not isinstance(state, Mapping):
            raise ValueError(
                f"the saved state of {where} is {state!r}, and no dict; leave it out to start afresh there"
            )
        if not state:  # no step was taken
            return {}, {}
        self._require_complete(state, where)
        adapted = {key: self._moment(state, key, param, where) for key in self._moments}
        dtype = moment_dtype(self._requested, param)
        # torch would make them the parameter's dtype.
        apart = {} if dtype == param.dtype else {key: moment.to(dtype) for key, moment in adapted.items()}
        if is_corrected(self._requested, param) and state.get(CORRECTION) is not None:
            adapted[CORRECTION] = self._correction(state, param, where)
        scalars = self._scalars(state, param, where)
        others = {key: value for key, value in state.items() if key not in self.known}
        # torch calls the type of whatever it can iterate over, and so makes "<generator object ...>" of a text.
        opaque = {key: value for key, value in others.items() if not isinstance(value, (Tensor, dict, list, tuple))}
        castable = {key: value for key, value in others.items() if key not in opaque}
        return {**adapted, **scalars, **castable}, {**apart, **scalars, **opaque}

    def _require_complete(self, state: Mapping[str, Any], where: str) -> None:
        """SGD keeps no step, and no buffer before the first one; Adam keeps all."""
        hollow = sorted(key for key in self.known if isinstance(state.get(key), dict))
        if hollow:  # so torch.distributed.checkpoint fills a flattened one (torch 2.13, _unflatten_optim_state_dict)
            raise ValueError(
                f"the saved state of {where} holds {{}} as {hollow}: the checkpoint has nothing for it; leave it out "
                "of the state_dict to start afresh there"
            )
        if self._adaptive:
            missing = [key for key in ("step", *self._moments) if state.get(key) is None]
        else:
            missing = [key for key in self._moments if "torque" in state and key not in state]
        if missing:
            raise ValueError(
                f"the saved state of {where} holds {sorted(map(str, state))} and so lacks {missing}: {self._name} "
                f"expects {sorted(self.known)}, or what its torch.optim counterpart keeps; it is another optimizer's"
            )

    def _moment(self, state: Mapping[str, Any], key: str, param: Tensor, where: str) -> Tensor:
        moment = state.get(key)
        if moment is None:
            return torch.zeros_like(param, memory_format=torch.preserve_format)
        moment = self._like(moment, key, param, where)
        if key == "momentum_buffer" and self._literal and self._is_sgds(state):
            return moment / moment_unit(0.0, averaged=False)
        return moment.resolve_conj().resolve_neg()  # what is to be negated when it is read, kernels would not

    def _correction(self, state: Mapping[str, Any], param: Tensor, where: str) -> Tensor:
        correction = self._like(state[CORRECTION], CORRECTION, param, where)
        if correction.dtype != param.dtype:
            raise ValueError(
                f"the saved {CORRECTION} of {where} is {correction.dtype}, and its bits are called {param.dtype}: "
                "whoever converted it has lost them; leave it out of the state to begin it anew"
            )
        return correction

    @staticmethod
    def _like(moment: Any, key: str, param: Tensor, where: str) -> Tensor:
        """A saved state that must lie as the parameter does."""
        if not isinstance(moment, Tensor):
            moment = torch.tensor(moment, device=param.device)
        assert isinstance(moment, Tensor)
        if type(moment) not in (Tensor, nn.Parameter, type(param)):  # a quantised one has no memory to be written to
            raise ValueError(
                f"the saved {key} of {where} is a {type(moment).__name__}: torch.optim's and these optimizers keep "
                "plain tensors; put what its dequantize() returns in its place, or start without that checkpoint"
            )
        # torch.optim takes moments of any shape here, and says nothing.
        if moment.shape != param.shape:
            raise ValueError(f"the saved {key} of {where} has shape {tuple(moment.shape)}")
        if getattr(moment, "placements", None) != getattr(param, "placements", None):
            raise ValueError(
                f"the saved {key} of {where} is not sharded as the parameter is; load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        return moment

    def _is_sgds(self, state: Mapping[str, Any]) -> bool:
        """Whether torch.optim.SGD made the state; see `_scalars` for one of ours that is fresh."""
        if not state.keys() & {"step", "torque"}:
            return not self._from_table
        numbers = [torch.as_tensor(state.get(key, 0.0)) for key in ("step", "torque")]
        return all(number.ndim == 0 and not number for number in numbers)

    def _scalars(self, state: Mapping[str, Any], param: Tensor, where: str) -> dict[str, Tensor]:
        """The scalar states; what is missing is filled in as for the moments of torch.optim's counterpart.

        torch.distributed.checkpoint fills what a checkpoint lacks from a fresh state of ours where it may: with
        full_state_dict=True, or DefaultLoadPlanner(allow_partial_load=True). A step of ours is counted, and leaves the
        scale above 0 or the torque below. No number is read on the host, which a fake tensor would not allow.
        """
        scalars = {
            key: self._scalar(default if state.get(key) is None else state[key], param, f"{key} of {where}")
            for key, default in self._defaults.items()
        }
        if {"torque", "exp_avg_scale"} <= state.keys() and scalars["torque"].ndim == 0:
            step, scale = scalars["step"], scalars["exp_avg_scale"]
            filled = (step > 0.0) & (scale == 0.0) & (scalars["torque"] == 0.0)
            scalars["exp_avg_scale"] = torch.where(filled, self._defaults["exp_avg_scale"], scale)
        return scalars

    def _scalar(self, value: Any, param: Tensor, where: str) -> Tensor:
        try:
            # Whatever it was: torch before 1.12 kept `step` as a Python number, and tools that unify states make
            # arrays.
            scalar = torch.as_tensor(value, dtype=torch.float32, device=param.device).detach()
        except (TypeError, ValueError) as error:
            raise ValueError(f"the saved {where} is no number: {value!r}") from error
        if self._flat:  # a vector over the buffer's tensors, or one number for all
            return scalar
        if scalar.numel() != 1:
            raise ValueError(f"the saved {where} has shape {tuple(scalar.shape)}, and must be one number")
        return scalar.reshape(())


@torch.inference_mode(False)  # tensors made in that mode cannot be stepped outside of it
def restore(optimizer: Member, adapted: Adapted) -> None:
    """Put back what torch.optim casts while loading: dtypes of our own, and others' values.

    1,000,001 steps became 999,424 and an fp32 torque a bf16 one in a bf16 model (torch 2.13, optim/optimizer.py).
    """
    keys = chain.from_iterable(group["params"] for group in adapted.state_dict["param_groups"])
    for key, param in zip(keys, params_of(optimizer), strict=True):
        for name, value in adapted.kept.get(key, {}).items():
            if name in optimizer.family.scalar_states:
                value = value.to(device=param.device, dtype=torch.float32, copy=True)
            elif name in optimizer.family.moments:
                value = value.to(device=param.device)
            optimizer.state[param][name] = value


def share_scalars(optimizer: Member, reducer: Reducer) -> None:
    """After a load, give this rank the scalar states of the tensors that it holds nothing of: those of other ranks.

    Communication: that of `Reducer.share`; every rank of a shard group must call it.
    """
    params, keys = params_of(optimizer), optimizer.family.scalar_states
    groups = [group for group in optimizer.param_groups for _ in group["params"]]

    def numbers() -> Tensor:
        device = device_of(params)
        # -inf, because `Reducer.share` takes the largest number of all ranks.
        unknown = torch.tensor(-math.inf, device=device)
        states = [optimizer.state.get(param, {}) for param in params]
        rows = [[unknown if key not in state else state[key].to(device) for key in keys] for state in states]
        return torch.stack([torch.stack(row) for row in rows])

    shared = reducer.share(numbers)
    for param, group, row in zip(params, groups, [] if shared is None else shared.unbind(), strict=shared is not None):
        if not optimizer.state.get(param) and row.isfinite().all():
            optimizer.family.complete(optimizer.state[param], param, group)
            for key, number in zip(keys, row, strict=True):
                optimizer.state[param][key].copy_(number)


def finish(optimizer: Member, packed: dict[str, Any]) -> None:
    """A hook of state_dict(), before any of the user's: see `TorqueAware.state_dict`. Changes `packed` in place."""
    if optimizer.logical.is_partitioned(optimizer.param_groups):
        stepped = [
            (optimizer.state[buffer], indices) for buffer, indices in optimizer.logical.buffers(optimizer.state)
        ]
        count = len(optimizer.logical.names(optimizer.param_groups))
        buffers.save_table(packed, stepped, count=count, scalar_states=optimizer.family.scalar_states)
    else:
        complete_states(optimizer, packed)


def complete_states(optimizer: Member, state_dict: dict[str, Any]) -> None:
    """Where there are DTensors, give the parameters that have none a state of zeros, as their first step would.

    A parameter that got no gradient yet (an expert without a token) has no state, but whoever loads the checkpoint
    with torch.distributed.checkpoint asks for one, and fails (torch 2.13; torch.optim.AdamW's checkpoints too).
    """
    params = params_of(optimizer)
    if not state_dict["state"] or not any(hasattr(param, "placements") for param in params):
        return
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    groups = (group for group in optimizer.param_groups for _ in group["params"])
    for key, param, group in zip(keys, params, groups, strict=True):
        if not state_dict["state"].get(key) and param.requires_grad:
            state_dict["state"][key] = {}
            optimizer.family.complete(state_dict["state"][key], param, group)
