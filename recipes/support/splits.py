"""The splits that a recipe trains and measures on: those there are, or what to give for those that are missing."""

from collections.abc import Callable

from recipes.support.errors import RecipeError
from recipes.support.records import Records


def present(
    train: Records,
    validation: Records | None,
    test: Records | None,
    check: Callable[[Records], None],
    *,
    evaluates: bool,
    named: str,
) -> dict[str, Records]:
    """Return the splits there are, by name, each checked.

    Args:
        train: the training records.
        validation: those evaluated on during training.
        test: those of the final metrics.
        check: raises where the records of a split are bad.
        evaluates: whether validation data is needed during training.
        named: what the flags for them end with, file or folder.

    Raises:
        RecipeError: there is nothing to evaluate on, or nothing to measure on at all.
    """
    splits = {"train": train, "validation": validation, "test": test}
    found = {name: split for name, split in splits.items() if split is not None}
    for split in found.values():
        check(split)
    if evaluates and validation is None:
        raise RecipeError(
            f"eval_strategy needs data: give --validation_{named}, or --validation_fraction 0.1 to hold out."
        )
    if len(found) == 1:
        raise RecipeError(
            f"nothing to measure on: give --test_{named}, --validation_{named} or --validation_fraction."
        )
    return found
