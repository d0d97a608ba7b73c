"""Between our state_dicts and those of torch.optim: which are accepted, how they are taken over, and the way back.

In AdamW's terms m = exp_avg / (2 (1 - beta1)), in SGD's m = momentum_buffer / 2: the factor that makes a neutral angle
(c = 1/2) plain AdamW or SGD. With step_size="adamw" or "sgd" our moment is theirs; with "paper" it is m itself.
"""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_tam.buffers import TABLE
from hf_tam.hyperparameters import validate, validate_step_size

if TYPE_CHECKING:
    from hf_tam.sharding import Reducer
    from hf_tam.torque_aware import TorqueAware

_CONSTRUCTORS = ("foreach", "fused", "capturable", "max_grad_norm")
"""How the step is executed, and whether it clips, is the constructor's to say, whatever made a checkpoint."""
_TORCH_ONLY = ("amsgrad", "differentiable", "nesterov", "dampening")


def adapt(optimizer: TorqueAware, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state_dict` in `optimizer`'s own form, checked against its parameters.

    Tensors are shared, not copied.

    Raises:
        ValueError: The state is another optimizer's, AMSGrad's, Nesterov's, or has other shapes than the parameters.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"not the state_dict of an optimizer: it holds {sorted(map(str, state_dict))}")
    saved_groups = deepcopy(state_dict["param_groups"])
    lengths = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved_groups)]
    if lengths[0] != lengths[1]:
        what = "has a different number of parameter groups"
        if len(lengths[0]) == len(lengths[1]):
            what = "contains a parameter group that doesn't match the size of optimizer's group"
        raise ValueError(
            f"loaded state dict {what} (saved: {lengths[1]} tensors, here: {lengths[0]}): it belongs to another "
            "model, or to other trainable parameters"
        )
    states = {}
    # Under ZeRO a buffer has no name of its own.
    names = repeat(None) if optimizer._logical.is_partitioned(optimizer.param_groups) else iter(optimizer._names())
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        _refuse_variants(saved)
        _require_family(optimizer, saved)
        literal = saved.get("step_size", group["step_size"]) == "paper"
        for key, param in zip(saved["params"], group["params"], strict=True):
            where = _describe(next(names), key, param)
            if key in state_dict["state"]:
                states[key] = _adapt_state(optimizer, state_dict["state"][key], param, saved, literal, where)
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        _adapt_group(group, saved)
    return {**state_dict, "state": states, "param_groups": saved_groups}


def _describe(name: str | None, key: int, param: Tensor) -> str:
    return f"parameter {name if name is not None else key} (shape {tuple(param.shape)})"


def _refuse_variants(saved: dict[str, Any]) -> None:
    for name, what in (("amsgrad", "AMSGrad"), ("nesterov", "Nesterov momentum"), ("dampening", "a dampening")):
        if saved.get(name):
            raise ValueError(
                f"the saved state was made with {name}={saved[name]}: a torque-aware optimizer has no form with "
                f"{what}; start it without that checkpoint"
            )


def _require_family(optimizer: TorqueAware, saved: dict[str, Any]) -> None:
    """The group must be of the same kind of optimizer, also where it holds no state yet."""
    name, adaptive = type(optimizer).__name__, "betas" in optimizer.defaults
    if adaptive != ("betas" in saved):
        raise ValueError(
            f"the saved state's param groups hold {sorted(saved)}: they are another optimizer's than {name}'s"
        )
    if adaptive and saved.get("decoupled_weight_decay", not optimizer.coupled) is optimizer.coupled:
        kind, ours = ("decoupled", "AdamW") if optimizer.coupled else ("coupled", "Adam")
        raise ValueError(
            f"the saved state has {kind} weight decay, as {ours} does, and {name} has not: "
            f"load it into hf_tam.{'AdaTAMW' if optimizer.coupled else 'AdaTAM'}"
        )
    if "step_size" in saved:
        validate_step_size(saved["step_size"], optimizer.step_sizes)


def _adapt_state(
    optimizer: TorqueAware, state: dict[str, Any], param: Tensor, saved: dict[str, Any], literal: bool, where: str
) -> dict[str, Any]:
    moments = optimizer.moments
    known = {*moments, *optimizer.scalar_states}
    # SGD keeps no step, and no buffer before the first one.
    missing = [key for key in moments if state.get(key) is None and key != "momentum_buffer"]
    if set(state) - known or missing or ("betas" in optimizer.defaults and "step" not in state):
        raise ValueError(
            f"the saved state of {where} holds {sorted(state)}, {type(optimizer).__name__} expects {sorted(known)} or "
            f"those of its torch.optim counterpart: it is another optimizer's"
        )
    adapted = {key: state[key] for key in moments if state.get(key) is not None}
    for key, moment in adapted.items():
        if moment.shape != param.shape:
            raise ValueError(f"the saved {key} of {where} has shape {tuple(moment.shape)}")
        if getattr(moment, "placements", None) != getattr(param, "placements", None):
            raise ValueError(
                f"the saved {key} of {where} is not sharded as the parameter is; load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
    return {
        **adapted,
        **_adapt_scalars(optimizer, state, saved, literal),
        **_adapt_buffer(adapted, state, param, saved, literal),
    }


def foreign_scalars(optimizer: TorqueAware, group: dict[str, Any]) -> dict[str, float]:
    """The scalar states of a tensor whose moments torch.optim's counterpart has left."""
    scalars = dict.fromkeys(optimizer.scalar_states, 0.0)
    if "exp_avg_scale" in scalars:
        scalars["exp_avg_scale"] = 1.0 / (2.0 * (1.0 - group["betas"][0])) if group["step_size"] == "paper" else 1.0
    return scalars


def _adapt_scalars(
    optimizer: TorqueAware, state: dict[str, Any], saved: dict[str, Any], literal: bool
) -> dict[str, Tensor]:
    foreign = foreign_scalars(optimizer, {**saved, "step_size": "paper" if literal else "adamw"})
    held = {key: value for key, value in state.items() if key == "step" or not _is_torchs(state, saved)}
    return {key: torch.as_tensor(held.get(key, value), dtype=torch.float32) for key, value in foreign.items()}


def _adapt_buffer(
    adapted: dict[str, Any], state: dict[str, Any], param: Tensor, saved: dict[str, Any], literal: bool
) -> dict[str, Tensor]:
    if "momentum_buffer" not in state:
        return {}
    buffer = adapted.get("momentum_buffer")
    if buffer is None:
        return {"momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format)}
    return {"momentum_buffer": buffer / 2.0 if literal and _is_torchs(state, saved) else buffer}


def _is_torchs(state: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether torch.optim's counterpart made the state: it has no torque, or that of a fresh state of ours.

    torch.distributed.checkpoint fills what a checkpoint lacks from a fresh state where it may: with
    full_state_dict=True, or DefaultLoadPlanner(allow_partial_load=True). A step of ours is counted, and leaves the
    scale above 0 or the torque below.
    """
    if "torque" not in state:
        return TABLE not in saved
    if torch.as_tensor(state["torque"]).ndim:  # a buffer of ZeRO's
        return False
    fresh = float(state["torque"]) == 0.0
    if "exp_avg" in state:
        return fresh and float(state["step"]) > 0.0 and float(state["exp_avg_scale"]) == 0.0
    return fresh and float(state["step"]) == 0.0


def _adapt_group(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Fill in what the checkpoint lacks, keep what is the constructor's, warn of what is overridden."""
    for key in _TORCH_ONLY:
        saved.pop(key, None)
    overridden = []
    for key, requested in group.items():
        if key in ("params", TABLE):
            continue
        if key in _CONSTRUCTORS or key not in saved:
            saved[key] = requested
        elif _overrides(key, group, saved):
            overridden.append(f"{key}={_plain(saved[key])} (requested: {_plain(requested)})")
    validate({key: value for key, value in saved.items() if key in group})
    if overridden:
        warnings.warn(
            f"the checkpoint's hyperparameters override the requested ones: {', '.join(overridden)}. To use the "
            "requested ones, set them in optimizer.param_groups after loading.",
            UserWarning,
            stacklevel=2,
        )


def adapt_groups(optimizer: TorqueAware, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of saved param groups in `optimizer`'s own form, for who loads the states by other ways than `adapt`.

    Args:
        optimizer: Not changed.
        groups: As many as it has.

    Raises:
        ValueError: They are another optimizer's.
    """
    adapted = deepcopy(groups)
    for group, saved in zip(optimizer.param_groups, adapted, strict=True):
        _refuse_variants(saved)
        _require_family(optimizer, saved)
        _adapt_group(group, saved)
    return adapted


def _overrides(key: str, group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether a saved value replaces a requested one; a value that a scheduler moves is compared where it started."""
    if key == "lr" and "max_lr" in saved:
        return False  # OneCycleLR and CyclicLR set their own, whatever was requested
    if key == "lr" and "initial_lr" in saved:
        return not _same(saved["initial_lr"], group.get("initial_lr", group["lr"]))
    scheduled = key in ("initial_lr", "max_lr", "min_lr", "param_names", "base_momentum", "max_momentum")
    if scheduled or (key in ("betas", "momentum") and "base_momentum" in saved):
        return False
    return not _same(saved[key], group[key])


def _same(saved: Any, requested: Any) -> bool:
    """Whether two hyperparameters are equal, as far as a learning rate in an fp32 tensor can tell."""
    left, right = _plain(saved), _plain(requested)
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(value) if isinstance(value, list) else value


def restore_scalars(optimizer: TorqueAware, state_dict: dict[str, Any]) -> None:
    """Put the scalar states back as saved: torch.optim casts them to the parameter's dtype while loading.

    1,000,001 steps became 999,424 and an fp32 torque a bf16 one in a bf16 model (torch 2.13, optim/optimizer.py).
    """
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for key, param in zip(keys, optimizer._params(), strict=True):
        if key in state_dict["state"]:
            for name in optimizer.scalar_states:
                value = state_dict["state"][key][name]
                optimizer.state[param][name] = value.to(device=param.device, dtype=torch.float32, copy=True)


def share_scalars(optimizer: TorqueAware, reducer: Reducer) -> None:
    """After a load, give this rank the scalar states of the tensors that it holds nothing of: those of other ranks.

    Communication: that of `Reducer.share`; every rank of a shard group must call it.
    """
    params, keys = list(optimizer._params()), optimizer.scalar_states

    def numbers() -> Tensor:
        rows = [[optimizer.state.get(param, {}).get(key) for key in keys] for param in params]
        unknown = torch.tensor(-math.inf, device=params[0].device)
        return torch.stack([torch.stack([unknown if value is None else value for value in row]) for row in rows])

    shared = reducer.share(numbers)
    for param, row in zip(params, [] if shared is None else shared.unbind(), strict=shared is not None):
        if not optimizer.state.get(param) and row.isfinite().all():
            optimizer._init_state(param, optimizer.state[param], None)
            for key, number in zip(keys, row, strict=True):
                optimizer.state[param][key].copy_(number)


def complete(optimizer: TorqueAware, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Where there are DTensors, give the parameters that have none a state of zeros, as their first step would.

    A parameter that got no gradient yet (an expert without a token) has no state, but whoever loads the checkpoint
    with torch.distributed.checkpoint asks for one, and fails (torch 2.13; torch.optim.AdamW's checkpoints too).
    """
    params = list(optimizer._params())
    if not state_dict["state"] or not any(hasattr(param, "placements") for param in params):
        return state_dict
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for key, param in zip(keys, params, strict=True):
        if key not in state_dict["state"] and param.requires_grad:
            state_dict["state"][key] = {}
            optimizer._init_state(param, state_dict["state"][key], None)
    return state_dict


def export_torch_state_dict(optimizer: TorqueAware) -> dict[str, Any]:
    """The state as torch.optim's counterpart loads it: AdamW's of AdaTAMW, Adam's of AdaTAM, SGD's of TAM.

    The torque is left behind. Moments are new tensors in the parameter's dtype. No communication.

    Args:
        optimizer: One of this package's optimizers.

    Returns:
        A state_dict for torch.optim.AdamW, Adam or SGD.

    Raises:
        TypeError: `optimizer` is none of ours.
    """
    if not hasattr(optimizer, "scalar_states"):
        raise TypeError(f"export_torch_state_dict takes an optimizer of hf_tam, got {type(optimizer).__name__}")
    packed = optimizer.state_dict()
    states = {}
    for group in packed["param_groups"]:
        for key in group["params"]:
            if key in packed["state"]:
                states[key] = _export_state(packed["state"][key], group)
    return {"state": states, "param_groups": [_export_group(group, optimizer) for group in packed["param_groups"]]}


def _export_state(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    literal = group["step_size"] == "paper"
    if "momentum_buffer" in state:
        return {"momentum_buffer": state["momentum_buffer"] * (2.0 if literal else 1.0)}
    scale = state["exp_avg_scale"] * (2.0 * (1.0 - group["betas"][0]) if literal else 1.0)
    on_device = group["capturable"] or group["fused"]
    return {
        "step": state["step"].clone() if on_device else state["step"].cpu(),
        "exp_avg": state["exp_avg"] * scale,
        "exp_avg_sq": state["exp_avg_sq"].clone(),
    }


def _export_group(group: dict[str, Any], optimizer: TorqueAware) -> dict[str, Any]:
    ours = ("gamma", "damping_eps", "scope", "step_size", "torque_steps", "nonfinite", "max_grad_norm")
    exported = {key: value for key, value in group.items() if key not in ours}
    # torch knows `capturable` on accelerators only; ours works everywhere.
    exported["capturable"] &= any(param.device.type != "cpu" for param in optimizer._params())
    if "betas" in exported:
        return {**exported, "amsgrad": False, "differentiable": False}
    del exported["capturable"]
    return {**exported, "dampening": 0.0, "nesterov": False, "differentiable": False}
