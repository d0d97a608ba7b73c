"""One domain after another, and what is remembered of those before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer

from recipes.support import outcome, reporting
from recipes.support.errors import RecipeError
from recipes.support.label_shift import sequence_metrics
from recipes.support.records import Records


def domains_of(train: Records, column: str) -> list[str]:
    """Return the domains in the order in which they are trained: by name.

    Raises:
        RecipeError: there is no such column, or only one domain.
    """
    train.require_columns(("domain_column", column))
    domains = sorted({str(value) for value in train.dataset[column]})
    if len(domains) < 2:
        raise RecipeError(f"{train.source}: '{column}' has the single value {domains[0]!r}: nothing shifts.")
    return domains


def cut(records: Records, encoded: Dataset, column: str, domains: list[str]) -> list[Dataset]:
    """Return the part of `encoded` that is of each domain.

    Raises:
        RecipeError: a record is of a domain that is never trained, or a domain has no record.
    """
    records.require_columns(("domain_column", column))
    places: dict[str, list[int]] = {domain: [] for domain in domains}
    for index, value in enumerate(records.dataset[column]):
        if str(value) not in places:
            raise RecipeError(f"{records.locate(index)}: no training record is of the domain {str(value)!r}.")
        places[str(value)].append(index)
    if empty := [domain for domain, found in places.items() if not found]:
        raise RecipeError(f"{records.source} has no record of the domain {empty[0]!r}: give one at least.")
    return [encoded.select(found) for found in places.values()]


def candidate_labels(parts: dict[str, list[Dataset]], names: list[str], domains: list[str]) -> torch.Tensor:
    """Return which labels a record may have whose domain is known.

    Args:
        parts: for each split ("train" among them) its part of each domain.
        names: of the labels.
        domains: their names.

    Returns:
        Whether label j belongs to the domain of label i: bool, shape (num_labels, num_labels).

    Raises:
        RecipeError: a label belongs to two domains, so that it does not tell the domain, or to another one elsewhere
            than in training.
    """
    domain_of: dict[int, int] = {}
    for position, part in enumerate(parts["train"]):
        for label in sorted(set(part["labels"])):
            if label in domain_of:
                raise RecipeError(
                    f"the label {names[label]!r} is of two domains, {domains[domain_of[label]]!r} and "
                    f"{domains[position]!r}: task_incremental needs labels that are of one; rename it in one of them."
                )
            domain_of[label] = position
    for split, of_domains in parts.items():
        for position, part in enumerate(of_domains):
            if strange := [label for label in sorted(set(part["labels"])) if domain_of.get(label) != position]:
                raise RecipeError(
                    f"{split} has the label {names[strange[0]]!r} in the domain {domains[position]!r}, where no "
                    "training record has it: task_incremental needs one that has, or leave the records out."
                )
    of_label = torch.tensor([domain_of.get(label, -1) for label in range(len(names))])
    return of_label[:, None] == of_label


def among(candidates: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function that leaves, of logits, those of the labels of a record's own domain.

    Args:
        candidates: of `candidate_labels`.
    """

    def narrow(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(~candidates.to(labels.device)[labels], -torch.inf)

    return narrow


def train_through(
    trainer: Trainer, domains: list[str], parts: dict[str, list[Dataset]], candidates: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """Train domain after domain with one optimizer; its schedule starts anew with each.

    Args:
        trainer: before training.
        domains: their names.
        parts: for each split ("train" among them) its part of each domain.
        candidates: of `candidate_labels`: among which labels each is told; None for all.

    Returns:
        For each other split its accuracies, shape (num_domains, num_domains): row k, after domain k, on the records of
        each; NaN where nobody asked: only those of a domain and of the one before are, and all at the end.
    """
    count = len(domains)
    accuracies = {name: np.full((count, count), np.nan) for name in parts if name != "train"}
    for position, domain in enumerate(domains):
        trainer.train_dataset = parts["train"][position]
        trainer.train()
        outcome.require_learning(trainer)
        asked = range(count) if position == count - 1 else range(max(0, position - 1), position + 1)
        for name, values in accuracies.items():
            for other in asked:
                prediction = trainer.predict(parts[name][other])
                logits, labels = prediction.predictions, prediction.label_ids
                if candidates is not None:
                    logits = np.where(candidates.numpy()[labels], logits, -np.inf)
                values[position, other] = (logits.argmax(-1) == labels).mean()
        reached = ", ".join(f"{name} accuracy {values[position, position]:.4f}" for name, values in accuracies.items())
        reporting.announce(f"{domain}, {position + 1} of {count}: {reached}")
    return accuracies


def domain_metrics(accuracies: np.ndarray, *, prefix: str) -> dict[str, Any]:
    """Sum up the accuracies of one split, as `train_through` returns them.

    Returns:
        Those of `sequence_metrics`, and `final_accuracy`: the mean over domains when the last one has been trained.
    """
    return sequence_metrics(accuracies, prefix=prefix) | {f"{prefix}_final_accuracy": float(accuracies[-1].mean())}
