"""Says where a Trainer's loss and gradient are too large: the model drops the count that they were to be divided by.

The Trainer hands every model whose forward takes **kwargs the number of targets of the whole step, and then divides
neither by the batches of the step nor by the processes (transformers 5.23, trainer.py). Many heads never use it.
https://github.com/huggingface/transformers/issues/47688
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable
from typing import Any

COUNT = "num_items_in_batch"
# What a loss is computed by in a forward: self.loss_function(...), CrossEntropyLoss(), loss_fct(...), F.mse_loss(...)
_LOSSES = ("loss", "loss_function", "loss_fct", "loss_fn", "cross_entropy", "criterion")

logger = logging.getLogger("hf_tam")


def warn_of_dropped_count(trainer: Any) -> None:
    """Warn, once for each class of models, where the loss will be too large by a factor above 1. No communication.

    Args:
        trainer: Before training.
    """
    factor = too_large_by(trainer)
    if factor > 1 and trainer.is_world_process_zero():
        _warn(type(_unwrapped(trainer.model)).__name__, factor)


@functools.cache
def _warn(model_name: str, factor: int) -> None:
    logger.warning(
        "%s drops %s, which the Trainer takes for used: the loss and the gradient are %d times too large (batches of "
        "a step times processes). Set trainer.model_accepts_loss_kwargs = False before train(), or give the Trainer a "
        "compute_loss_func that divides by it.",
        model_name,
        COUNT,
        factor,
    )


def too_large_by(trainer: Any) -> int:
    """The factor by which loss and gradient of a Trainer are too large; 1 where all is well, or cannot be told.

    A Trainer that computes its loss in its own way, as TRL's do, is left alone.
    """
    from transformers import Trainer

    computes_itself = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    overridden = any(getattr(type(trainer), name) is not getattr(Trainer, name) for name in _OVERRIDABLE)
    if trainer.model is None or not trainer.model_accepts_loss_kwargs or computes_itself or overridden:
        return 1
    if not drops_count(_unwrapped(trainer.model)):
        return 1
    args = trainer.args
    processes = args.n_gpu if args.n_gpu > 1 else args.world_size
    return int(args.gradient_accumulation_steps * (processes if args.average_tokens_across_devices else 1))


_OVERRIDABLE = ("compute_loss", "training_step")


def drops_count(model: Any) -> bool:
    """Whether the forward of a model computes a loss of `labels`, and lets the count go that it is handed.

    Read from the source of forward: a model that leaves its loss to another one, or has no source, is not accused.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward)))
    except (OSError, TypeError):
        return False
    if COUNT in source or "labels" not in inspect.signature(type(model).forward).parameters:
        return False
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _is_loss(node.func)]
    passed = [call for call in calls if any(keyword.arg is None for keyword in call.keywords)]  # **kwargs
    if not passed:
        return bool(calls)
    return any(_name(call.func) == "loss_function" for call in passed) and _is_loss_of_vectors(model)


def _is_loss(function: ast.expr) -> bool:
    return _name(function).lower().endswith(_LOSSES)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_loss_of_vectors(model: Any) -> bool:
    """Whether transformers' loss of classifiers is a regression's or one of several labels, which take no count."""
    loss: Callable[..., Any] = getattr(model, "loss_function", None) or (lambda: None)
    if getattr(loss, "__name__", "") != "ForSequenceClassificationLoss":
        return False
    kind = model.config.problem_type
    return kind in ("regression", "multi_label_classification") or (kind is None and model.config.num_labels == 1)


def _unwrapped(model: Any) -> Any:
    """The model itself, out of torch.compile's wrapper and that of an adapter."""
    model = getattr(model, "_orig_mod", model)
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model
