"""The param groups of a state_dict: whose they are, and what becomes of the hyperparameters in them."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

from torch import Tensor

from hf_tam.family import Member
from hf_tam.hyperparameters import plain, validate, validate_step_size
from hf_tam.step.buffers import TABLE

_CONSTRUCTORS = ("foreach", "fused", "capturable", "max_grad_norm", "param_correction", "state_bits")
"""How the step is executed and its states are kept, and whether it clips, is the constructor's to say, whatever made a
checkpoint."""
_TORCH_ONLY = ("amsgrad", "differentiable", "nesterov", "dampening")
_OWN_RATES = {"max_lr", "swa_lr"}
"""With these in a group OneCycleLR, CyclicLR and SWALR set their own learning rates, whatever was requested."""
_OTHERS = {"momentum_decay": "NAdam", "centered": "RMSprop", "ns_steps": "Muon"}
"""What the groups of torch's optimizers hold that otherwise look like Adam's or SGD's (torch 2.13)."""


def refuse_others(optimizer: Member, saved: dict[str, Any]) -> None:
    """Accept the groups of this class and of its torch.optim counterpart only, also where there is no state yet.

    One that holds parameters alone is nobody's: torch.distributed.checkpoint loses what an empty group holds
    (https://github.com/pytorch/pytorch/issues/143828).

    Raises:
        ValueError: They are another optimizer's, or a variant's that has no torque-aware form.
    """
    if saved.keys() <= {"params", "param_names"}:
        return
    for name, what in (("amsgrad", "AMSGrad"), ("nesterov", "Nesterov momentum"), ("dampening", "a dampening")):
        if saved.get(name):
            raise ValueError(
                f"the saved state was made with {name}={saved[name]}: a torque-aware optimizer has no form with "
                f"{what}; start it without that checkpoint"
            )
    name, adaptive = type(optimizer).__name__, "betas" in optimizer.defaults
    other = next((maker for key, maker in _OTHERS.items() if key in saved), None)
    # RAdam's, NAdam's and Adamax's have all that Adam's have but `amsgrad`.
    if adaptive and "differentiable" in saved and not saved.keys() & {"amsgrad", "step_size"}:
        other = other or "RAdam or Adamax"
    if other or adaptive != ("betas" in saved) or not (adaptive or "momentum" in saved):
        raise ValueError(
            f"the saved state's param groups hold {sorted(map(str, saved))}: they are another optimizer's than "
            f"{name}'s{f' ({other})' if other else ''}"
        )
    if adaptive and saved.get("decoupled_weight_decay", not optimizer.family.coupled) is optimizer.family.coupled:
        kind, ours = ("decoupled", "AdamW") if optimizer.family.coupled else ("coupled", "Adam")
        raise ValueError(
            f"the saved state has {kind} weight decay, as {ours} does, and {name} has not: "
            f"load it into hf_tam.{'AdaTAMW' if optimizer.family.coupled else 'AdaTAM'}"
        )
    if "step_size" in saved:
        validate_step_size(saved["step_size"], optimizer.step_sizes)


def is_literal(optimizer: Member, group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether the moments will be the paper's own, and not in the scale of torch.optim's."""
    return bool(saved.get("step_size", group.get("step_size", optimizer.defaults["step_size"])) == "paper")


def adapt_group(optimizer: Member, group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Make a saved group one of `optimizer`'s: fill in what it lacks, keep what is the constructor's.

    Hyperparameters become plain numbers, except a learning rate in a tensor. Whatever else stands in the group is
    kept as it is. Warns of values that replace requested ones.

    Args:
        optimizer: Whose group it becomes.
        group: The group that is to be replaced: what was requested.
        saved: The saved group; changed in place.

    Raises:
        ValueError: A hyperparameter is out of range.
    """
    for key in _TORCH_ONLY:
        saved.pop(key, None)
    overridden = []
    for key, requested in {**optimizer.defaults, **group}.items():
        if key in ("params", TABLE):
            continue
        if key in _CONSTRUCTORS or key not in saved:
            saved[key] = requested
        elif key in optimizer.defaults:
            if not isinstance(saved[key], Tensor) or key != "lr":
                # Every backend takes plain numbers, and torch.load(weights_only=True), by which the Trainer resumes,
                # reads them.
                saved[key] = plain(saved[key])
            if _overrides(key, group, saved):
                overridden.append(f"{key}={plain(saved[key])} (requested: {plain(requested)})")
    _check(optimizer, saved)
    if overridden:
        warnings.warn(
            f"the checkpoint's hyperparameters override the requested ones: {', '.join(overridden)}. To use the "
            "requested ones, set them in optimizer.param_groups after loading (in a Trainer by a callback, in its "
            "on_train_begin).",
            UserWarning,
            stacklevel=2,
        )


def _check(optimizer: Member, saved: dict[str, Any]) -> None:
    """As the constructor does; but a schedule may have gone below 0 by rounding, as `lr -= decrement` does."""
    known = {key: saved[key] for key in optimizer.defaults}
    if isinstance(known["lr"], (Real, Tensor)):
        known["lr"] = abs(known["lr"])
    validate(known)


def _overrides(key: str, group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether a saved value replaces another that was requested.

    What a schedule moves is compared where it started, which schedulers note as `initial_lr` and the like. A learning
    rate of which nobody noted that may have been moved by hand, or by a scheduler that leaves no trace (ignite's,
    ReduceLROnPlateau): the saved value is then neither right nor wrong.
    """
    if key not in group or (key == "lr" and saved.keys() & _OWN_RATES):
        return False
    start = f"initial_{key}"
    if start in saved:
        return not _same(saved[start], group.get(start, group[key]))
    if key == "lr" or (key in ("betas", "momentum") and "base_momentum" in saved):
        return False
    return not _same(saved[key], group[key])


def _same(saved: Any, requested: Any) -> bool:
    """Whether two hyperparameters are equal, as far as a number in an fp32 tensor can tell."""
    left, right = plain(saved), plain(requested)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)
