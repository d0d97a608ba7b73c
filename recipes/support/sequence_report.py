"""What the scripts that train through a sequence of tasks leave behind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from recipes.support import models, parallel, reporting
from recipes.support.output import RESULTS_NAME, naming_a_full_disk


class StepCount(TrainerCallback):
    """Counts the optimizer's steps, through as many calls of `train` as there are.

    Attributes:
        count: So far.
    """

    count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take one more."""
        self.count += 1


_PREFIXES = {"validation": "eval", "test": "test"}


def report(
    recipe: str,
    trainer: Trainer,
    accuracies: dict[str, np.ndarray],
    sum_up: Callable[..., dict[str, Any]],
    groups: tuple[Any, ...],
    *,
    num_steps: int,
    num_records: int,
    started: float,
) -> None:
    """Write results.json, print the table, and leave the process group.

    Args:
        recipe: name of the script, for the table.
        trainer: after the sequence.
        accuracies: of each split, shape (num_tasks, num_tasks).
        sum_up: makes metrics of them, given the `prefix` of their names.
        groups: arguments of the run, one group a dataclass.
        num_steps: of the whole sequence.
        num_records: trained on.
        started: by time.perf_counter.
    """
    metrics = {
        key: value
        for name, values in accuracies.items()
        for key, value in sum_up(values, prefix=_PREFIXES[name]).items()
    }
    output_dir = Path(trainer.args.output_dir)
    facts = reporting.describe_run(
        trainer.optimizer,
        models.count_parameters(trainer.model),
        strategy=parallel.describe_strategy(trainer.accelerator),
        num_records=num_records,
        num_steps=num_steps,
        seconds=time.perf_counter() - started,
    )
    with naming_a_full_disk(output_dir):
        if trainer.is_world_process_zero():
            output_dir.mkdir(parents=True, exist_ok=True)
            reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics}, groups)
            shown = {name: value for name, value in metrics.items() if not isinstance(value, list)}
            reporting.print_table(f"{recipe}: {output_dir}", {**facts, **shown})
    parallel.leave_group(trainer.accelerator)
