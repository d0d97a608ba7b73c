"""The new head of a classifier, which starts from random weights on a body that has been trained before."""

import dataclasses
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from recipes.support import adapters, models
from recipes.support.arguments import ModelArguments
from recipes.support.errors import RecipeError


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules beside the model's body: ["classifier"] in most classes.

    Raises:
        RecipeError: nothing stands beside it.
    """
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    body = model.base_model
    # CLIP and a few more have no module of the name of their body; the head comes last in them, too
    names = children[-1:] if body is model else [name for name in children if getattr(model, name) is not body]
    if not names:
        raise RecipeError(
            f"{type(model).__name__} has its head inside its body: no adapter without it, drop --use_peft."
        )
    return names


def add_adapter(model: PreTrainedModel, arguments: ModelArguments, task: TaskType | None) -> Any:
    """Put a LoRA adapter on the layers named and train the head whole, or return the model as it is for full training.

    peft would train a `classifier` or `score` whole where it knows the task, and DistilBERT's `pre_classifier`, whose
    name ends alike, would be adapted and trained whole at once, which fails (0.21).

    Raises:
        RecipeError: the model has no layer of the names given, no linear layer but the head, or statistics of batches,
            which an adapter does not hold.
    """
    if not arguments.use_peft:
        return model
    head = head_names(model)
    whole = [*(arguments.lora_modules_to_save or []), *head]
    targets = arguments.lora_target_modules
    if targets in (None, adapters.ALL_LINEAR):
        linear = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
        targets = [name for name in linear if name.split(".")[0] not in head]
        if not targets:
            raise RecipeError(
                "this model has no linear layer but its head: drop --use_peft, or name layers by"
                " --lora_target_modules."
            )
    _require_kept_statistics(model, whole)
    return models.add_adapter(
        model, dataclasses.replace(arguments, lora_target_modules=targets, lora_modules_to_save=whole), task
    )


def _require_kept_statistics(model: torch.nn.Module, whole: list[str]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not any(f".{kept}." in f".{name}." for kept in whole):
            raise RecipeError(
                f"the running statistics of {name} change in training, and an adapter does not hold them: drop"
                f" --use_peft, or add --lora_modules_to_save {name.rsplit('.', 1)[-1]}."
            )


def use_learning_rate(trainer: Trainer, rate: float | None) -> None:
    """Have `trainer` give the head a learning rate of its own, whichever its optimizer is; the schedule scales both.

    No communication.

    Args:
        trainer: before training, with a model that is whole.
        rate: the head's; None leaves it at the body's.
    """
    if rate is None:
        return
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    in_head = tuple(f"{name}." for name in head_names(model))

    def choose(model: torch.nn.Module) -> set[int]:
        return {id(param) for name, param in model.named_parameters() if _unwrapped(name).startswith(in_head)}

    adapters.set_when_created(trainer, choose, lambda learning_rate: rate)


def _unwrapped(name: str) -> str:
    """Leave out of a parameter's name what peft, FSDP1, activation checkpointing and torch.compile put into it."""
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part not in _WRAPPERS]
    return ".".join(parts)


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
