"""Stopping where evaluations no longer improve, and going back to the best."""

from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from recipes.support.arguments import SftRunArguments
from recipes.support.errors import RecipeError
from recipes.support.reporting import warn


def check_early_stopping(run: SftRunArguments, arguments: TrainingArguments) -> None:
    """Check, before anything is loaded, that stopping early can work as it was asked for.

    Raises:
        RecipeError: nothing is evaluated, or the metric would be pushed in the wrong direction.
    """
    if arguments.metric_for_best_model in ("perplexity", "eval_perplexity") and arguments.greater_is_better:
        raise RecipeError(
            "metric_for_best_model is perplexity, of which less is better, and greater_is_better is true (the default"
            " for all but a loss): give --greater_is_better false."
        )
    if run.early_stopping_patience is not None and arguments.eval_strategy == "no":
        raise RecipeError("early_stopping_patience counts evaluations: give --eval_strategy epoch, or --eval_steps N.")
    if run.early_stopping_patience is None and run.early_stopping_threshold:
        warn("early_stopping_threshold is without effect unless early_stopping_patience is given")


def use_early_stopping(trainer: Trainer, run: SftRunArguments) -> None:
    """Have `trainer` stop early, if asked to; the best model is taken wherever a checkpoint of each evaluation exists.

    What counts is `metric_for_best_model`, by default the loss. A resumed run goes on counting where it was stopped.
    """
    arguments = trainer.args
    if run.early_stopping_patience is None:
        return
    if arguments.metric_for_best_model is None:
        arguments.metric_for_best_model, arguments.greater_is_better = "loss", False
    arguments.restore_callback_states_from_checkpoint = True
    if _saves_what_it_evaluates(trainer):
        arguments.load_best_model_at_end = True
    elif not arguments.load_best_model_at_end:
        warn("checkpoints are not written at every evaluation: the result is the last model, not the best one")
    trainer.add_callback(EarlyStoppingCallback(run.early_stopping_patience, run.early_stopping_threshold))


def _saves_what_it_evaluates(trainer: Trainer) -> bool:
    arguments = trainer.args
    if arguments.save_strategy != arguments.eval_strategy or arguments.save_only_model:
        return False
    return arguments.eval_strategy != "steps" or arguments.save_steps == arguments.eval_steps
