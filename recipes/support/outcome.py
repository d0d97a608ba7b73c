"""What is no result, although the run came to its end."""

import math
from typing import Any

import torch
from transformers import Trainer

from recipes.support.errors import RecipeError


def require_learning(trainer: Trainer) -> None:
    """Check, before anything is measured or saved, that a step was taken and left numbers.

    No communication: a process that holds a part of the model looks at its part.

    Args:
        trainer: after training.

    Raises:
        RecipeError: no step was taken, or a parameter is none; with its name.
    """
    num_steps = trainer.state.global_step
    if num_steps == 0:
        raise RecipeError(
            f"no step was taken: num_train_epochs is {trainer.args.num_train_epochs:g} and max_steps"
            f" {trainer.args.max_steps}, of {len(trainer.train_dataset)} records: nothing was trained or saved."
        )
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise RecipeError(f"{name} is not finite after {num_steps} steps: {_REMEDY}")


def require_numbers(metrics: dict[str, Any]) -> None:
    """Check, before anything is saved, that what was measured are numbers.

    Raises:
        RecipeError: naming the first that is none.
    """
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{name} is {value}: {_REMEDY}")


_REMEDY = "nothing was saved; take a lower learning_rate, or look at the data and the model that training began with."
