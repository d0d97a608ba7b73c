"""What the scripts for supervised fine-tuning say at the end."""

from pathlib import Path
from typing import Any

from recipes.support import reporting
from recipes.support.output import RESULTS_NAME


def report(
    recipe: str,
    output_dir: Path,
    facts: dict[str, Any],
    metrics: dict[str, float],
    samples: dict[str, list[str]],
    arguments: tuple[Any, ...],
) -> None:
    """Write results.json, and print the samples and the table; on one process only.

    Args:
        recipe: name of the script, for the table.
        output_dir: of the run.
        facts: what `reporting.describe_run` returned.
        metrics: of training and evaluation.
        samples: `prompts`, and what the model wrote `before` and `after`.
        arguments: of the run, one group a dataclass.
    """
    for prompt, before, after in zip(samples["prompts"], samples["before"], samples["after"], strict=True):
        print(f"\nprompt  {prompt}\nbefore  {before}\nafter   {after}")
    reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics, "samples": samples}, arguments)
    shown = {
        name: value for name, value in metrics.items() if name.startswith(("eval", "test")) or name == "train_loss"
    }
    reporting.print_table(f"{recipe}: {output_dir}", {**facts, **shown})
