"""A LoRA adapter on an image classifier, whose new head is trained whole."""

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from hf_tam.integrations.peft import find_wrapped_adapters
from recipes.support.arguments import LoraArguments
from recipes.support.errors import RecipeError

_HEAD = "classifier"


def add(model: Any, arguments: LoraArguments) -> Any:
    """Put a LoRA adapter on the linear and convolutional layers named, or return the model as it is for full training.

    peft knows no task of images: the head is named here, and "all-linear" resolved without it.

    Raises:
        RecipeError: the model has no layer of the names given.
    """
    if arguments.full:
        return model
    find_wrapped_adapters()
    targets: Any = arguments.lora_target_modules
    if targets == ["all-linear"]:
        targets = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _HEAD not in name
        ]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=[_HEAD],
    )
    try:
        if not targets:
            raise ValueError("it has no linear layer but the head")
        return get_peft_model(model, config)
    except ValueError as error:
        named = " ".join(arguments.lora_target_modules)
        raise RecipeError(f"lora_target_modules = {named}: {' '.join(str(error).split())}") from error
