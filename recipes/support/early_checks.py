"""What would end a run in a traceback, or in nonsense, and can be known before a model is loaded."""

import importlib.util
import math

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from recipes.support.errors import RecipeError

# Steps of AdamW are as large as the rate: at 1 every weight of a usual model is gone after one.
_LARGEST_LEARNING_RATE = 100.0
_PACKAGES = {"liger_kernel": "liger-kernel"}


def check(arguments: TrainingArguments) -> None:
    """Check arguments that transformers takes and then cannot use.

    Raises:
        RecipeError: the first that is wrong, with its value and what to do.
    """
    _check_learning_rate(arguments)
    length = getattr(arguments, "max_length", None)
    if length is not None and length < 1:
        raise RecipeError(f"max_length = {length}: must be at least 1.")
    _check_what_has_no_effect(arguments)
    for name in arguments.report_to:
        if name not in get_available_reporting_integrations():
            raise RecipeError(
                f"report_to = {name}: not installed (pip install {name}), or unknown; here can be used:"
                f" {', '.join(get_available_reporting_integrations()) or 'nothing'}, and none."
            )
    if arguments.use_liger_kernel:
        _require_package("use_liger_kernel", "liger_kernel")
    if arguments.save_strategy == "best":
        if arguments.eval_strategy == "no":
            raise RecipeError(
                "save_strategy = best: nothing is evaluated (eval_strategy no): give --eval_strategy epoch."
            )
        if arguments.metric_for_best_model is None:
            arguments.metric_for_best_model, arguments.greater_is_better = "loss", False


def _check_what_has_no_effect(arguments: TrainingArguments) -> None:
    if getattr(arguments, "truncation_mode", "keep_start") == "keep_end":
        raise RecipeError(
            "truncation_mode = keep_end: records that are too long lose their end here: raise max_length, or cut them"
            " before."
        )
    if getattr(arguments, "padding_free", False) and not getattr(arguments, "packing", False):
        raise RecipeError("padding_free = true: only packed rows need no padding: add --packing, or drop it.")
    if arguments.batch_eval_metrics:
        raise RecipeError("batch_eval_metrics = true: metrics are taken over all records at once here: drop it.")
    if str(arguments.lr_scheduler_type.value) == "cosine_with_min_lr" and not arguments.lr_scheduler_kwargs:
        raise RecipeError(
            "lr_scheduler_type = cosine_with_min_lr: say how low, by --lr_scheduler_kwargs '{\"min_lr\": 1e-6}'."
        )


def _check_learning_rate(arguments: TrainingArguments) -> None:
    rate = arguments.learning_rate
    if not 0.0 <= rate < math.inf:
        raise RecipeError(f"learning_rate = {rate}: must be a finite number of at least 0.")
    if rate > _LARGEST_LEARNING_RATE:
        raise RecipeError(f"learning_rate = {rate}: above {_LARGEST_LEARNING_RATE:g} nothing is learned: give less.")


def _require_package(flag: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        name = _PACKAGES[module]
        raise RecipeError(f"{flag}: {name} is not installed: pip install {name}, or drop {flag}.")
