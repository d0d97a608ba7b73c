"""The names in transformers' training arguments, and what their values are checked for; needs no torch."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from hf_tam import hyperparameters
from hf_tam.integrations.transformers.optim_args import format_optim_args, parse_optim_args

OPTIMIZERS = {"adatamw": "AdaTAMW", "adatam": "AdaTAM", "tam": "TAM"}


def register_without_torch(module: ModuleType) -> None:
    """Make the names known where training arguments are only read.

    The values are held to the ranges that the constructors hold them to; no constructor is called.

    Args:
        module: `transformers.training_args`.
    """
    ours = [name for name in OPTIMIZERS if name not in {member.value for member in module.OptimizerNames}]
    for name in ours:
        add_member(module.OptimizerNames, name)
    original = module.TrainingArguments.__post_init__

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.optim in ours:
            self.optim = str.__str__(self.optim)
            self.optim_args = format_optim_args(parse_optim_args(self.optim, self.optim_args))
            check_values(self)

    module.TrainingArguments.__post_init__ = wrapped


def add_member(names: Any, value: str) -> None:
    """Add a member to a closed enum of strings: HfArgumentParser takes its choices by iterating over it."""
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    # The pickle of the member itself must be plain too, for arguments that were changed after their creation.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[value] = member
    vars(names).get("_hashable_values_", []).append(value)  # Python >= 3.12
    type.__setattr__(names, member._name_, member)  # Enum's own refuses to set members


def constructor_kwargs(args: Any) -> dict[str, Any]:
    """What the constructor takes from training arguments whose `optim` is one of ours.

    Raises:
        ValueError: If `optim_args` is malformed.
    """
    values: dict[str, Any] = dict(parse_optim_args(args.optim, args.optim_args))
    values.pop("log_torque", None)
    kwargs: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if values.pop("fused_clip", False):
        kwargs["max_grad_norm"] = max_grad_norm(args)
    if args.optim != "tam":
        betas = (values.pop("beta1", args.adam_beta1), values.pop("beta2", args.adam_beta2))
        kwargs |= {"betas": betas, "eps": args.adam_epsilon}
    return kwargs | values


def max_grad_norm(args: Any) -> float | None:
    """What `optim_args=fused_clip=true` hands over to the optimizer.

    Args:
        args: TrainingArguments.

    Returns:
        `args.max_grad_norm`; None where there is nothing to clip to, or where the engine of DeepSpeed clips.
    """
    limit: float | None = args.max_grad_norm
    return limit if limit is not None and limit > 0.0 and args.deepspeed_plugin is None else None


def check_values(args: Any) -> None:
    """Hold the values of one of our optimizers to their ranges, in the order in which its constructor does.

    Raises:
        ValueError: A value is out of its range.
    """
    given = constructor_kwargs(args)
    accepted = hyperparameters.MOMENTUM_STEP_SIZES if args.optim == "tam" else hyperparameters.ADAPTIVE_STEP_SIZES
    for depends_on_device in ("foreach", "fused", "capturable"):
        given.pop(depends_on_device, None)
    try:
        hyperparameters.validate({name: given[name] for name in hyperparameters.HYPERPARAMETERS if name in given})
        hyperparameters.validate_step_size(given.get("step_size", accepted[0]), accepted)
    except ValueError as error:
        raise unusable(args, error) from error


def unusable(args: Any, error: Exception) -> ValueError:
    """Return the error that names the optimizer and its `optim_args`."""
    given = f" with optim_args {args.optim_args!r}" if args.optim_args else ""
    return ValueError(f"--optim {args.optim}{given} cannot be used: {error}")
