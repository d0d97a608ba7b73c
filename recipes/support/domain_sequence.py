"""One domain after another, and what is remembered of those before."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Trainer

from recipes.support import reporting
from recipes.support.errors import RecipeError
from recipes.support.label_shift import sequence_metrics
from recipes.support.records import Records


@dataclass
class DomainArguments:
    """The sequence of domains."""

    domain_column: str = field(default="domain", metadata={"help": "Column that says which domain a record is of."})


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


def train_through(trainer: Trainer, domains: list[str], parts: dict[str, list[Dataset]]) -> dict[str, np.ndarray]:
    """Train domain after domain with one optimizer; its schedule starts anew with each.

    Args:
        trainer: before training.
        domains: their names.
        parts: for each split ("train" among them) its part of each domain.

    Returns:
        For each other split its accuracies, shape (num_domains, num_domains): row k, after domain k, on the records of
        each; NaN where nobody asked: only those of a domain and of the one before are, and all at the end.
    """
    count = len(domains)
    accuracies = {name: np.full((count, count), np.nan) for name in parts if name != "train"}
    for position, domain in enumerate(domains):
        trainer.train_dataset = parts["train"][position]
        trainer.train()
        asked = range(count) if position == count - 1 else range(max(0, position - 1), position + 1)
        for name, values in accuracies.items():
            for other in asked:
                prediction = trainer.predict(parts[name][other])
                values[position, other] = (prediction.predictions.argmax(-1) == prediction.label_ids).mean()
        reached = ", ".join(f"{name} accuracy {values[position, position]:.4f}" for name, values in accuracies.items())
        reporting.announce(f"{domain}, {position + 1} of {count}: {reached}")
    return accuracies


def domain_metrics(accuracies: np.ndarray, *, prefix: str) -> dict[str, Any]:
    """Sum up the accuracies of one split, as `train_through` returns them.

    Returns:
        Those of `sequence_metrics`, and `final_accuracy`: the mean over domains when the last one has been trained.
    """
    return sequence_metrics(accuracies, prefix=prefix) | {f"{prefix}_final_accuracy": float(accuracies[-1].mean())}
