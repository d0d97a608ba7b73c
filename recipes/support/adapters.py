"""What an adapter is put on: the layers named on the command line, checked against those that the model has."""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, TaskType
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D
from trl import get_peft_config

from recipes.support.arguments import ModelArguments
from recipes.support.errors import RecipeError

ALL_LINEAR = "all-linear"

# What no name of a module has; a dot alone tells nothing.
_PATTERN_CHARACTER = re.compile(r"[^\w.-]")
_LINEAR = (torch.nn.Linear, Conv1D)


def make_config(model: PreTrainedModel, arguments: ModelArguments, task: TaskType | None) -> LoraConfig:
    """Return TRL's configuration of the adapter, of names that are there.

    Where input and output embeddings are one tensor and one of them is in `lora_modules_to_save`, both are trained as
    one.

    Raises:
        RecipeError: a name, or the regular expression, matches nothing in the model.
    """
    whole = arguments.lora_modules_to_save or []
    require_targets(model, arguments.lora_target_modules)
    _require_names(model, arguments)
    _leave_output_layer(model, arguments)
    config = get_peft_config(arguments)
    config.task_type = task
    config.ensure_weight_tying = _saves_a_tied_embedding(model, whole)
    start = arguments.init_lora_weights
    # LoftQ replaces what an adapter starts with by default, once the weights below are quantised.
    if start is not None and start != "loftq":
        config.init_lora_weights = start
    if start == "eva":
        # the same rank everywhere, as its own start would have: so a checkpoint fits
        config.eva_config = EvaConfig(rho=1.0)
    return config


def is_pattern(targets: list[str] | str | None) -> bool:
    """Whether `targets` is one regular expression: it has a character that no name of a module has."""
    return isinstance(targets, str) and targets != ALL_LINEAR and bool(_PATTERN_CHARACTER.search(targets))


def require_targets(model: torch.nn.Module, targets: list[str] | str | None) -> None:
    """Check that every layer to adapt is there.

    Args:
        model: without an adapter.
        targets: names or ends of names, one regular expression for whole names, "all-linear", or None for what peft
            adapts in models of this kind.

    Raises:
        RecipeError: one of them matches nothing; with the names that there are.
    """
    if targets is None or targets == ALL_LINEAR:
        return
    names = [name for name, module in model.named_modules() if name]
    if isinstance(targets, str) and is_pattern(targets):
        _require_pattern(targets, names, model)
        return
    targets = [targets] if isinstance(targets, str) else targets
    for target in targets:
        if _PATTERN_CHARACTER.search(target) or target == ALL_LINEAR:
            raise RecipeError(
                f"lora_target_modules = {' '.join(targets)}: {target} stands alone or not at all: give names, or one"
                f" regular expression, or {ALL_LINEAR}."
            )
        _require_match("lora_target_modules", target, names, linear_names(model))


def _require_names(model: torch.nn.Module, arguments: ModelArguments) -> None:
    """Check the modules that are trained whole, and the parameters that are adapted without their module."""
    with_weights = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for name in arguments.lora_modules_to_save or []:
        _require_match("lora_modules_to_save", name, with_weights, _last_parts(with_weights))
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))
    for name in arguments.lora_target_parameters or []:
        _require_match("lora_target_parameters", name, parameters, known)


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last parts of the names of all linear layers that can be adapted, in their order."""
    return _last_parts(_whole_linear_names(model))


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


def use_loraplus(trainer: Trainer, arguments: ModelArguments) -> None:
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


def _whole_linear_names(model: torch.nn.Module) -> list[str]:
    output = _fused_output(model)
    return [name for name, module in model.named_modules() if isinstance(module, _LINEAR) and name != output]


def _fused_output(model: torch.nn.Module) -> str | None:
    """Name the output layer of a causal language model, whose weights TRL (1.16) multiplies by itself."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output is None or model.config.is_encoder_decoder:
        return None
    return next((name for name, module in model.named_modules() if module is output), None)


def _leave_output_layer(model: torch.nn.Module, arguments: ModelArguments) -> None:
    """Refuse an adapter that TRL would never train.

    Raises:
        RecipeError: with the flag, and what to do.
    """
    output, targets = _fused_output(model), arguments.lora_target_modules
    if output is None:
        return
    named = [targets] if isinstance(targets, str) else targets or []
    find = re.fullmatch if is_pattern(targets) else _ends
    flags = {name: "lora_target_modules" for name in named if find(name, output)}
    weights = [f"{output}.{name}" for name, _ in model.get_submodule(output).named_parameters()]
    for name in arguments.lora_target_parameters or []:
        if any(_ends(name, weight) for weight in weights):
            flags[name] = "lora_target_parameters"
    for name, flag in flags.items():
        raise RecipeError(
            f"{flag} = {name}: the loss is computed from the weights of {output} itself, so an adapter on it would"
            f" never be trained: leave it out, or train it whole by --lora_modules_to_save {output}."
        )


def _ends(wanted: str, name: str) -> bool:
    """Whether peft finds a module or a parameter by `wanted`: by its whole name, or from a dot to the end."""
    return name == wanted or name.endswith(f".{wanted}")


def _require_pattern(pattern: str, names: list[str], model: torch.nn.Module) -> None:
    try:
        found = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise RecipeError(f"lora_target_modules = {pattern} is no regular expression: {error}.") from error
    if not found:
        example = (_whole_linear_names(model) or names)[-1]
        raise RecipeError(
            f"lora_target_modules = {pattern}: the whole name of a layer must match, such as '{example}', and none"
            f" does. The linear layers are {', '.join(linear_names(model))}."
        )


def _require_match(flag: str, wanted: str, names: list[str], known: list[str]) -> None:
    if not any(_ends(wanted, name) for name in names):
        what = {"lora_target_modules": "linear layers", "lora_target_parameters": "parameters"}.get(flag, "modules")
        raise RecipeError(
            f"{flag} = {wanted}: nothing in this model is called like that. The {what} are {', '.join(known)}."
        )


def _last_parts(names: list[str]) -> list[str]:
    last = (name.rsplit(".", 1)[-1] for name in names)
    return list(dict.fromkeys(name for name in last if not name.isdigit()))


def _saves_a_tied_embedding(model: PreTrainedModel, modules_to_save: list[str]) -> bool:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if not modules_to_save or outputs is None or inputs.weight is not outputs.weight:
        return False
    embeddings = [name for name, module in model.named_modules() if module is inputs or module is outputs]
    return any(_ends(wanted, name) for name in embeddings for wanted in modules_to_save)
