"""The older table of comparisons.md, from rows in this folder: `python -m recipes.results.summary`.

Each row of `banking77-minilm.jsonl` is one run of `recipes/classify.py`, as its results.json has it.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

ROWS = Path(__file__).with_name("banking77-minilm.jsonl")
OPTIMIZERS = ("adamw_torch", "adatamw")


def table(path: Path = ROWS) -> str:
    """One line a learning rate: accuracy and training loss of both optimizers, their difference seed by seed.

    Args:
        path: JSON lines with optim, learning_rate, seed, test_accuracy and train_loss.

    Returns:
        A Markdown table.
    """
    runs = pd.read_json(path, lines=True)
    lines = [
        "| learning rate | seeds | `adamw_torch` accuracy | `adatamw` accuracy | difference by seed | training loss |",
        "|---|---|---|---|---|---|",
    ]
    for rate, group in runs.groupby("learning_rate", sort=True):
        accuracy = (
            100 * group.pivot_table(index="seed", columns="optim", values="test_accuracy")[[*OPTIMIZERS]].dropna()
        )
        loss = group.pivot_table(index="seed", columns="optim", values="train_loss")[[*OPTIMIZERS]].dropna().mean()
        differences = (accuracy["adatamw"] - accuracy["adamw_torch"]).round(1)
        lines.append(
            f"| {rate:g} | {len(accuracy)} | {_mean(accuracy['adamw_torch'])} | {_mean(accuracy['adatamw'])} | "
            f"{', '.join(f'{difference:+.1f}' for difference in differences)} | "
            f"{loss['adamw_torch']:.2f} / {loss['adatamw']:.2f} |"
        )
    return "\n".join(lines)


def _mean(values: pd.Series) -> str:
    mean = f"{values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.1f}"


if __name__ == "__main__":
    print(table())
