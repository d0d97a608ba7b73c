"""Says where another optimizer trains than the one that the training arguments ask for.

A script may hand the Trainer an optimizer, a class, or override how it makes one: that goes before --optim.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hf_tam.integrations.wrapped import find_ours, innermost

logger = logging.getLogger("hf_tam")


def warn_of_another_optimizer(optimizer: Any, *, optim: str, expected: type, given: Mapping[str, Any]) -> None:
    """Compare the optimizer that trains with --optim and --optim_args, and warn of what has no effect.

    Args:
        optimizer: The Trainer's, wrapped or not.
        optim: What --optim says, one of ours.
        expected: The class that it stands for.
        given: What --optim_args say, by the names of its constructor.
    """
    trains = find_ours(optimizer)
    if trains is None or not isinstance(trains, expected):
        logger.warning(
            "--optim %s (hf_tam.%s) has no effect: the script gives the Trainer an optimizer of its own, and %s "
            "trains. Take one of the two out.",
            optim,
            expected.__name__,
            describe(optimizer),
        )
        return
    ignored = [
        f"{key}={value} (it has {trains.defaults[key]})"
        for key, value in given.items()
        if key in trains.defaults and trains.defaults[key] != value
    ]
    if ignored:
        logger.warning(
            "--optim_args has no effect on the %s that the script gives the Trainer: %s.",
            expected.__name__,
            ", ".join(ignored),
        )


def describe(optimizer: Any) -> str:
    """The class of the optimizer itself, with the package that it is from."""
    kind = type(innermost(optimizer))
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"


def refuse_to_be_left_aside(optimizer: Any, *, optim: str) -> None:
    """Refuse an optimizer of ours that was handed to a Trainer with DeepSpeed, which makes one itself.

    transformers 5.23 (integrations/deepspeed.py, deepspeed_init) forgets the one that it was given, without a word.

    Args:
        optimizer: The Trainer's before training; one that is wrapped is of an earlier training.
        optim: What --optim says.

    Raises:
        ValueError: It is one of ours.
    """
    if optimizer is not None and find_ours(optimizer) is optimizer:
        name = type(optimizer).__name__
        raise ValueError(
            f"Under DeepSpeed transformers would leave the {name} of optimizers=(...) aside, and train with --optim "
            f"{optim}: pass optimizer_cls_and_kwargs=(hf_tam.{name}, {{...}}) to the Trainer instead."
        )
