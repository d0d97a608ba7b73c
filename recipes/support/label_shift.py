"""Tasks that differ by their labels, and what is measured over a sequence of them."""

from typing import Any

import numpy as np
import torch
from transformers import Trainer

from recipes.support import image_data, outcome, reporting


class Labels:
    """What each class is called in each task.

    Attributes:
        tables: for each task the label of each class, shape (num_tasks, num_classes); the first task leaves them.
    """

    def __init__(self, num_classes: int, *, num_tasks: int, fraction: float, seed: int) -> None:
        """Draw the permutations.

        Args:
            num_classes: how many classes there are.
            num_tasks: how many tasks.
            fraction: of the classes whose labels are permuted among themselves, drawn anew for every task.
            seed: of the draws.
        """
        generator = np.random.default_rng(seed)
        self.tables = np.tile(np.arange(num_classes), (num_tasks, 1))
        for table in self.tables[1:]:
            chosen = generator.choice(num_classes, round(fraction * num_classes), replace=False)
            table[chosen] = generator.permutation(chosen)

    def collator(self, task: int) -> Any:
        """Return the function that makes a batch with the labels of a task."""
        table = torch.from_numpy(self.tables[task])

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = image_data.collate(rows)
            return {**batch, "labels": table[batch["labels"]]}

        return collate


def train_through(trainer: Trainer, labels: Labels, splits: dict[str, Any]) -> dict[str, np.ndarray]:
    """Train task after task with one optimizer; its schedule starts anew with each.

    Args:
        trainer: before training.
        labels: of the tasks.
        splits: what is predicted after each task, by name.

    Returns:
        For each split its accuracies, shape (num_tasks, num_tasks): row k, after task k, by the labels of each task.
    """
    accuracies = {name: np.zeros((len(labels.tables), len(labels.tables))) for name in splits}
    for task in range(len(labels.tables)):
        trainer.data_collator = labels.collator(task)
        trainer.train()
        outcome.require_learning(trainer)
        trainer.data_collator = labels.collator(0)
        for name, split in splits.items():
            prediction = trainer.predict(split)
            predicted, classes = prediction.predictions.argmax(-1), prediction.label_ids
            accuracies[name][task] = (predicted == labels.tables[:, classes]).mean(1)
        reached = ", ".join(f"{name} accuracy {values[task, task]:.4f}" for name, values in accuracies.items())
        reporting.announce(f"task {task + 1} of {len(labels.tables)}: {reached}")
    return accuracies


def sequence_metrics(accuracies: np.ndarray, *, prefix: str) -> dict[str, Any]:
    """Sum up the accuracies of one split, as `train_through` returns them.

    Returns:
        Names that begin with `prefix`: the mean over tasks of the accuracy at a task's end (`mean_accuracy`), that of
        the second half (`late_accuracy`) and of each task (`task_accuracies`), and how much of a task's accuracy is
        lost when the next has been trained (`forgetting`).
    """
    own = np.diagonal(accuracies)
    lost = own[:-1] - np.diagonal(accuracies, offset=-1)
    return {
        f"{prefix}_mean_accuracy": float(own.mean()),
        f"{prefix}_late_accuracy": float(own[len(own) // 2 :].mean()),
        f"{prefix}_forgetting": float(lost.mean()),
        f"{prefix}_task_accuracies": [round(float(value), 6) for value in own],
    }
