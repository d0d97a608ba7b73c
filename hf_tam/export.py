"""The way back to torch.optim: a state without torque. See `hf_tam.checkpoint` for the way here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_tam.checkpoint import complete_states, params_of
from hf_tam.family import CORRECTION, Member, member_in
from hf_tam.hyperparameters import HYPERPARAMETERS
from hf_tam.update import moment_unit

__all__ = ["export_torch_state_dict"]


def export_torch_state_dict(optimizer: Any) -> dict[str, Any]:
    """The state as torch.optim's counterpart loads it: AdamW's of AdaTAMW, Adam's of AdaTAM, SGD's of TAM.

    The torque and what bfloat16 leaves out of the weights are left behind. Moments are new tensors in the dtype that
    they are kept in. Hooks of state_dict() are not run. No
    communication.

    Args:
        optimizer: One of this package's optimizers, or what accelerate or DeepSpeed have wrapped around one.

    Returns:
        A state_dict for torch.optim.AdamW, Adam or SGD.

    Raises:
        TypeError: `optimizer` is none of ours.
        RuntimeError: DeepSpeed ZeRO keeps the state, in flat buffers that torch.optim has no form of.
    """
    given, optimizer = optimizer, member_in(optimizer)
    if optimizer is None:
        raise TypeError(f"export_torch_state_dict takes an optimizer of hf_tam, got {type(given).__name__}")
    if optimizer.logical.is_partitioned(optimizer.param_groups):
        raise RuntimeError(
            "export_torch_state_dict: under DeepSpeed ZeRO the state lies in flat buffers, each with a step and a "
            "scale for every tensor in it, of which torch.optim has no form; go on with hf_tam's optimizer"
        )
    packed = _pack(optimizer)
    states, known = {}, {*optimizer.family.moments, *optimizer.family.scalar_states, CORRECTION}
    for group in packed["param_groups"]:
        for key in group["params"]:
            if packed["state"].get(key):
                states[key] = _export_state(packed["state"][key], group, known)
    return {"state": states, "param_groups": [_export_group(group, optimizer) for group in packed["param_groups"]]}


def _pack(optimizer: Member) -> dict[str, Any]:
    """What torch.optim.Optimizer.state_dict returns, whatever hooks make of it."""
    keys: dict[Tensor, int] = {}
    for position, param in enumerate(params_of(optimizer)):
        keys.setdefault(param, position)
    groups = [{**group, "params": [keys[param] for param in group["params"]]} for group in optimizer.param_groups]
    packed = {
        "state": {key: optimizer.state[param] for param, key in keys.items() if param in optimizer.state},
        "param_groups": groups,
    }
    complete_states(optimizer, packed)
    return packed


def _export_state(state: dict[str, Any], group: dict[str, Any], known: set[str]) -> dict[str, Any]:
    literal = group["step_size"] == "paper"
    others = {key: value for key, value in state.items() if key not in known}
    if "momentum_buffer" in state:
        unit = moment_unit(group["momentum"], averaged=False) if literal else 1.0
        return {"momentum_buffer": state["momentum_buffer"] * unit, **others}
    scale = state["exp_avg_scale"] * (moment_unit(group["betas"][0], averaged=True) if literal else 1.0)
    # Where torch expects it: see its note [special device hosting for step] (torch/optim/optimizer.py).
    on_device = group["capturable"] or group["fused"]
    return {
        "step": state["step"].clone() if on_device else state["step"].cpu(),
        "exp_avg": state["exp_avg"] * scale,
        "exp_avg_sq": state["exp_avg_sq"].clone(),
        **others,
    }


def _export_group(group: dict[str, Any], optimizer: Member) -> dict[str, Any]:
    ours = {name for name, known in HYPERPARAMETERS.items() if not known.is_torchs}
    exported = {key: value for key, value in group.items() if key not in ours}
    # torch knows `capturable` on accelerators only; ours works everywhere.
    exported["capturable"] &= any(param.device.type != "cpu" for param in params_of(optimizer))
    if "betas" in exported:
        return {**exported, "amsgrad": False, "differentiable": False}
    del exported["capturable"]
    return {**exported, "dampening": 0.0, "nesterov": False, "differentiable": False}
