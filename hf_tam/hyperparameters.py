"""The ranges of every hyperparameter, in one place: constructors, param groups and `optim_args` are checked here."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch import Tensor

SCOPES = ("tensor", "model")
NONFINITE = ("skip", "raise", "propagate")
PARAM_CORRECTIONS = ("bits16",)
STATE_BITS = (32,)
ADAPTIVE_STEP_SIZES = ("adamw", "paper")
MOMENTUM_STEP_SIZES = ("sgd", "paper")

# Each message begins as torch.optim's own does where torch checks the same thing (torch/optim/adam.py, sgd.py).
_TORCH_WORDS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "weight_decay": "Invalid weight_decay value",
    "momentum": "Invalid momentum value",
}


def validate(hyperparameters: Mapping[str, Any]) -> None:
    """Check every hyperparameter that is present.

    Args:
        hyperparameters: Names and values, as in an optimizer's `defaults` or in one of its `param_groups`. Names that
            are not hyperparameters (`params`, `initial_lr`, ...) are left alone.

    Raises:
        ValueError: A value is outside its range (NaN and infinity included); the message names the argument, the value
            and what is accepted.
    """
    for name, value in hyperparameters.items():
        check = HYPERPARAMETERS[name].check if name in HYPERPARAMETERS else None
        if check is not None:
            check(name, value)
    if hyperparameters.get("foreach") and hyperparameters.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if _is_tensor(hyperparameters.get("lr")) and "betas" in hyperparameters:
        # As torch.optim.AdamW; torch.optim.SGD, and so TAM, has no such limit.
        if hyperparameters.get("foreach") and not hyperparameters.get("capturable"):
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    """Arguments are checked without torch too; a tensor cannot be there before it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _refuse(name: str, value: object, accepted: str) -> None:
    words = _TORCH_WORDS.get(name, f"Invalid {name} value")
    raise ValueError(f"{words}: {value} ({name} must be {accepted})")


def plain(value: Any) -> Any:
    """A Python number for a tensor, an array or a number of numpy's with one element; a tuple for several."""
    read = getattr(value, "tolist", None)
    if read is not None:
        value = read()
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def plain_numbers(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, as Python's: torch.optim takes tensors and arrays, too.

    `lr` stays a tensor, which schedulers write to.
    """
    return {
        name: plain(value)
        for name, value in hyperparameters.items()
        if name in HYPERPARAMETERS and not (name == "lr" and _is_tensor(value))
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def _learning_rate(name: str, value: object) -> None:
    if _is_tensor(value):
        if value.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = value.item()
    _at_least_zero(name, value)


def _at_least_zero(name: str, value: object) -> None:
    number = _number(value)
    if number is None or not 0.0 <= number < math.inf:
        _refuse(name, value, "a finite number >= 0")


def _positive(name: str, value: object) -> None:
    number = _number(value)
    if number is None or not 0.0 < number < math.inf:
        _refuse(name, value, "a finite number > 0")


def _below_one(name: str, value: object) -> None:
    number = _number(value)
    if number is None or not 0.0 <= number < 1.0:
        _refuse(name, value, "a number in [0, 1)")


def _at_most_one(name: str, value: object) -> None:
    number = _number(value)
    if number is None or not 0.0 <= number <= 1.0:
        _refuse(name, value, "a number in [0, 1]; 1 keeps the torque at 0, which is plain AdamW or SGD")


def _betas(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"Invalid betas value: {value} (betas must be two numbers in [0, 1))")
    for index, beta in enumerate(value):
        number = _number(beta)
        if number is None or not 0.0 <= number < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta} (betas must be two numbers in [0, 1))")


def _torque_steps(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0):
        _refuse(name, value, "None or a whole number >= 0")


def _max_grad_norm(name: str, value: object) -> None:
    if value is not None:
        number = _number(value)
        if number is None or not 0.0 < number < math.inf:
            _refuse(name, value, "None or a finite number > 0")


def _param_correction(name: str, value: object) -> None:
    if value is not None and value not in PARAM_CORRECTIONS:
        _refuse(name, repr(value), f"None or one of {', '.join(map(repr, PARAM_CORRECTIONS))}")


def _state_bits(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or value not in STATE_BITS):
        _refuse(name, value, f"None or {' or '.join(map(str, STATE_BITS))}")


def _optional_flag(name: str, value: object) -> None:
    if value is not None and not isinstance(value, bool):
        _refuse(name, value, "True, False or None")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "True or False")


def _one_of(*accepted: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if value not in accepted:
            raise ValueError(
                f"Invalid {name} value: {value!r} ({name} must be one of {', '.join(map(repr, accepted))})"
            )

    return check


class Hyperparameter(NamedTuple):
    """What there is to know of a hyperparameter, besides what it does.

    Attributes:
        check: Called with name and value; raises ValueError where that is out of range. None: it is the optimizer's
            to say, see `validate_step_size`.
        kind: What `optim_args` reads it as, see `hf_tam.integrations.transformers.optim_args`; None: it has its own
            argument there.
        rule: "adam" or "sgd" where the others do not have it.
        is_agreed: Whether it must be the same on all ranks. Not what schedules move, nor how a step is executed.
        is_torchs: Whether torch.optim's counterpart has it too.
    """

    check: Callable[[str, object], None] | None
    kind: str | None = None
    rule: str | None = None
    is_agreed: bool = False
    is_torchs: bool = True


HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "lr": Hyperparameter(_learning_rate),
    "betas": Hyperparameter(_betas, rule="adam"),
    "momentum": Hyperparameter(_below_one, "number", "sgd"),
    "eps": Hyperparameter(_positive, "number", "adam"),
    "weight_decay": Hyperparameter(_at_least_zero),
    "gamma": Hyperparameter(_at_most_one, "number", is_agreed=True, is_torchs=False),
    "damping_eps": Hyperparameter(_at_least_zero, "number", is_agreed=True, is_torchs=False),
    "scope": Hyperparameter(_one_of(*SCOPES), "word", is_agreed=True, is_torchs=False),
    "step_size": Hyperparameter(None, "word", is_agreed=True, is_torchs=False),
    "torque_steps": Hyperparameter(_torque_steps, "optional integer", is_agreed=True, is_torchs=False),
    "nonfinite": Hyperparameter(_one_of(*NONFINITE), "word", is_agreed=True, is_torchs=False),
    "max_grad_norm": Hyperparameter(_max_grad_norm, is_agreed=True, is_torchs=False),
    "param_correction": Hyperparameter(_param_correction, "optional word", is_agreed=True, is_torchs=False),
    "state_bits": Hyperparameter(_state_bits, "optional integer", is_agreed=True, is_torchs=False),
    "maximize": Hyperparameter(_flag, "flag"),
    "foreach": Hyperparameter(_optional_flag, "optional flag"),
    "fused": Hyperparameter(_optional_flag, "optional flag", "adam"),
    "capturable": Hyperparameter(_flag, "flag", "adam"),
}


def validate_step_size(value: object, accepted: tuple[str, ...]) -> None:
    """Check `step_size`, whose names differ between the adaptive optimizers and TAM.

    Raises:
        ValueError: `value` is not one of `accepted`.
    """
    _one_of(*accepted)("step_size", value)
