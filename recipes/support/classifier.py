"""What classify.py and vision.py do alike once they have a Trainer: train, measure, save, report, merge."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from recipes.support import (
    adapters,
    classifier_files,
    heads,
    merging,
    models,
    outcome,
    parallel,
    reporting,
    text_metrics,
    training,
)
from recipes.support.arguments import DEMO
from recipes.support.config import RecipeParser, parse_recipe_arguments
from recipes.support.output import RESULTS_NAME, check_disk_space, naming_a_full_disk


def parse(parser: RecipeParser, argv: list[str] | None, *, demo_config: Path) -> tuple[Any, ...]:
    """Return the arguments, one group a dataclass; the demo's where nothing is named, not even a run to merge.

    Args:
        parser: the recipe's.
        argv: what follows the name of the script; None for that of this process.
        demo_config: what runs where nothing is named.
    """
    argv = sys.argv[1:] if argv is None else argv
    demo = None if merging.names_finished_run(argv) else demo_config
    return parse_recipe_arguments(parser, argv, demo_config=demo)


def run(
    recipe: str,
    trainer: Trainer,
    encoded: dict[str, Any],
    share: Callable[[str], float],
    groups: tuple[Any, ...],
    *,
    auto_class: Any,
    resume_from: Path | None,
    started: float,
) -> int:
    """Train, measure on the validation and on the test data, those that there are, and leave a folder that loads.

    Args:
        recipe: name of the script, for the table.
        trainer: before training.
        encoded: the splits by name.
        share: gives the share of the most frequent class in a split, beside which its accuracy is to be seen.
        groups: arguments of the run, one group a dataclass.
        auto_class: loads the model.
        resume_from: a checkpoint.
        started: by time.perf_counter.

    Returns:
        The exit status.

    Raises:
        RecipeError: the disk is full, nothing was learned, or what was merged is not what was trained.
    """
    run_arguments, of_model, output_dir = groups[0], groups[1], Path(trainer.args.output_dir)
    check_disk_space(output_dir, trainer.model, full=not of_model.use_peft)
    sizes = models.count_parameters(trainer.model)
    if run_arguments.head_learning_rate is None and groups[1].model_name_or_path not in (None, DEMO):
        reporting.announce(
            "the new head is trained at the learning rate of the body; --head_learning_rate 20x may teach it more, and"
            " --head_learning_rate 1x leaves this line out"
        )
    heads.use_learning_rate(trainer, run_arguments.head_rate(trainer.args.learning_rate))
    adapters.use_loraplus(trainer, of_model)
    metrics = training.train(trainer, run_arguments, resume_from=resume_from)
    outcome.require_learning(trainer)
    for name, prefix in (("validation", "eval"), ("test", "test")):
        if name in encoded:
            metrics |= trainer.evaluate(encoded[name], metric_key_prefix=prefix)
            metrics[f"{prefix}_most_frequent_class"] = share(name)
    outcome.require_numbers(metrics)
    is_main = trainer.is_world_process_zero()
    with naming_a_full_disk(output_dir):
        classifier_files.save(trainer)
        if is_main:
            facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
            reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics}, groups)
            reporting.print_table(f"{recipe}: {output_dir}", {**facts, **text_metrics.without_timing(metrics)})
    parallel.leave_group(trainer.accelerator)
    return classifier_files.complete(output_dir, auto_class, merge=run_arguments.merge) if is_main else 0
