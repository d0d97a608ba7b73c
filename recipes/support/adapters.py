"""What an adapter is put on: the layers named on the command line, checked against those that the model has."""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, TaskType
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from recipes.support.arguments import LoraArguments
from recipes.support.errors import RecipeError

ALL_LINEAR = "all-linear"

# What no name of a module has; a dot alone tells nothing.
_PATTERN_CHARACTER = re.compile(r"[^\w.-]")
_LINEAR = (torch.nn.Linear, Conv1D)


def make_config(model: PreTrainedModel, arguments: LoraArguments, task: TaskType | None) -> LoraConfig:
    """Return peft's configuration of the adapter.

    Where input and output embeddings are one tensor and one of them is in `modules_to_save`, both are trained as one.

    Raises:
        RecipeError: a name, or the regular expression, matches no layer of the model.
    """
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=find_targets(model, arguments.lora_target_modules),
        modules_to_save=find_whole_modules(model, arguments.modules_to_save) or None,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        ensure_weight_tying=_saves_a_tied_embedding(model, arguments.modules_to_save),
        task_type=task,
    )


def is_pattern(targets: list[str]) -> bool:
    """Whether `targets` is one regular expression: it has a character that no name of a module has."""
    return targets != [ALL_LINEAR] and len(targets) == 1 and bool(_PATTERN_CHARACTER.search(targets[0]))


def find_targets(model: torch.nn.Module, targets: list[str]) -> list[str] | str:
    """Return `targets` as peft takes them: a string for all linear layers or a regular expression, else the names.

    Raises:
        RecipeError: one of them matches nothing; with the names that there are.
    """
    if targets == [ALL_LINEAR]:
        return ALL_LINEAR
    names = [name for name, module in model.named_modules() if name]
    if is_pattern(targets):
        return _checked_pattern(targets[0], names, model)
    for target in targets:
        if _PATTERN_CHARACTER.search(target) or target == ALL_LINEAR:
            raise RecipeError(
                f"lora_target_modules = {' '.join(targets)}: {target} stands alone or not at all: give names, or one"
                f" regular expression, or {ALL_LINEAR}."
            )
        _require_match("lora_target_modules", target, names, linear_names(model))
    return targets


def find_whole_modules(model: torch.nn.Module, modules: list[str]) -> list[str]:
    """Return the names of `modules_to_save`.

    Raises:
        RecipeError: one of them matches no module that has weights; with the names that there are.
    """
    with_weights = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for name in modules:
        _require_match("modules_to_save", name, with_weights, _last_parts(with_weights))
    return modules


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last parts of the names of all linear layers, in their order."""
    return _last_parts([name for name, module in model.named_modules() if isinstance(module, _LINEAR)])


def set_learning_rates(optimizer: torch.optim.Optimizer, chosen: set[int], rate: Callable[[float], float]) -> None:
    """Give some parameters another learning rate, in parameter groups of their own.

    Call it before the first step and before the schedule is made. No communication.

    Args:
        optimizer: any.
        chosen: the ids of the parameters.
        rate: of their group's learning rate, returns theirs.
    """
    for group in list(optimizer.param_groups):
        apart = [param for param in group["params"] if id(param) in chosen]
        group["params"] = [param for param in group["params"] if id(param) not in chosen]
        if apart:
            optimizer.add_param_group({**group, "params": apart, "lr": rate(group["lr"])})
    # A group that is empty has nothing to say, and DeepSpeed wants none.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def matrices_b(model: torch.nn.Module) -> set[int]:
    """Return the ids of the B matrices of an adapter, of which LoRA+ scales the learning rate.

    Told by name and not by shape, as peft's create_loraplus_optimizer tells them (0.21): FSDP1 and ZeRO-3 make every
    parameter one-dimensional.

    Source: LoRA+ (https://huggingface.co/papers/2402.12354), section 5.
    """
    return {id(param) for name, param in model.named_parameters() if re.search(r"\.lora_(embedding_)?B\.", name)}


def use_loraplus(trainer: Trainer, arguments: LoraArguments) -> None:
    """Have `trainer` scale the learning rates of its optimizer as LoRA+ does, if asked to."""
    if arguments.loraplus_lr_ratio is not None:
        ratio = arguments.loraplus_lr_ratio
        set_when_created(trainer, matrices_b, lambda learning_rate: learning_rate * ratio)


def set_when_created(trainer: Trainer, choose: Callable[[Any], set[int]], rate: Callable[[float], float]) -> None:
    """Have `trainer` set learning rates of its optimizer, whichever it is, when it builds it.

    Args:
        trainer: before training.
        choose: of the model whose parameters the optimizer gets, returns the ids of those with another rate.
        rate: of the learning rate of the others, returns theirs.
    """
    create = trainer.create_optimizer

    def create_and_set(model: Any = None) -> torch.optim.Optimizer:
        is_new = trainer.optimizer is None
        optimizer = create() if model is None else create(model)
        if is_new:
            set_learning_rates(optimizer, choose(trainer.model if model is None else model), rate)
        return optimizer

    trainer.create_optimizer = create_and_set


def _checked_pattern(pattern: str, names: list[str], model: torch.nn.Module) -> str:
    try:
        found = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise RecipeError(f"lora_target_modules = {pattern} is no regular expression: {error}.") from error
    if not found:
        raise RecipeError(
            f"lora_target_modules = {pattern}: the whole name of a layer must match, such as '{names[-1]}', and none"
            f" does. The linear layers are {', '.join(linear_names(model))}."
        )
    return pattern


def _require_match(flag: str, wanted: str, names: list[str], known: list[str]) -> None:
    """Match names as peft does: whole, or from a dot to the end."""
    if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
        what = "linear layers" if flag == "lora_target_modules" else "modules"
        raise RecipeError(
            f"{flag} = {wanted}: no layer of this model is called like that. The {what} are {', '.join(known)}."
        )


def _last_parts(names: list[str]) -> list[str]:
    last = (name.rsplit(".", 1)[-1] for name in names)
    return list(dict.fromkeys(name for name in last if not name.isdigit()))


def _saves_a_tied_embedding(model: PreTrainedModel, modules_to_save: list[str]) -> bool:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if not modules_to_save or outputs is None or inputs.weight is not outputs.weight:
        return False
    embeddings = [name for name, module in model.named_modules() if module is inputs or module is outputs]
    return any(name == wanted or name.endswith(f".{wanted}") for name in embeddings for wanted in modules_to_save)
