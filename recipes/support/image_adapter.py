"""A LoRA adapter on an image classifier, whose new head is trained whole."""

import dataclasses
from typing import Any

from recipes.support import adapters, models
from recipes.support.arguments import LoraArguments
from recipes.support.errors import RecipeError

_HEAD = "classifier"


def add(model: Any, arguments: LoraArguments) -> Any:
    """Put a LoRA adapter on the layers named, or return the model as it is for full training.

    peft knows no task of images (0.21): "all-linear" is resolved here without the head, and the head saved by name.

    Raises:
        RecipeError: the model has no layer of the names given, or no linear layer but the head.
    """
    if arguments.full:
        return model
    targets = arguments.lora_target_modules
    if targets == [adapters.ALL_LINEAR]:
        targets = [name for name in adapters.linear_names(model) if name != _HEAD]
        if not targets:
            raise RecipeError(
                "this model has no linear layer but its head: add --full, or name layers by --lora_target_modules."
            )
    whole = [*arguments.modules_to_save, _HEAD]
    return models.add_adapter(
        model, dataclasses.replace(arguments, lora_target_modules=targets, modules_to_save=whole), None
    )
