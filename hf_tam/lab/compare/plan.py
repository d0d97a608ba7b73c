"""What is to be compared, from a YAML file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import isfinite
from os.path import normpath
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Plan", "PlanError", "Spec", "load_plan"]


class PlanError(Exception):
    """The file cannot be used; one sentence says why and what to do."""


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        recipe: Name of a script in recipes/, without .py.
        label: What the table calls the optimizer.
        arguments: Everything the recipe is given but its output_dir.
    """

    recipe: str
    label: str
    arguments: dict[str, Any]

    @property
    def learning_rate(self) -> float:
        """Of the run."""
        return float(self.arguments["learning_rate"])

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.arguments["seed"])

    @property
    def key(self) -> str:
        """The same for the same arguments, however they are ordered; tells whether a row is of this run."""
        return hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode()).hexdigest()[:16]

    def command_line(self) -> list[str]:
        """The arguments as flags; a list becomes several words, null is left out."""
        words = []
        for name, value in self.arguments.items():
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(word).lower() if isinstance(word, bool) else str(word) for word in values)]
        return words


@dataclass(frozen=True)
class Plan:
    """A comparison. The first optimizer is the one that the others are compared with.

    Attributes:
        name: Of the comparison.
        recipe: Name of a script in recipes/, without .py.
        arguments: Of every run.
        optimizers: Label to further arguments, `optim` among them.
        learning_rates: The grid, rising.
        seeds: Of the final runs, at each optimizer's best learning rate.
        search_seeds: How many of them, from the first on, are run at every learning rate.
        max_extensions: How often the grid may be extended because a best learning rate lies at its end.
        validation_metric: Key of results.json by which a learning rate is chosen.
        test_metric: Key of results.json that is reported; not looked at before.
        greater_is_better: Of both.
        tolerance: Differences of the test metric up to this count as "within".
        also_shown: Further keys of results.json whose means stand in the table and decide nothing.
    """

    name: str
    recipe: str
    arguments: dict[str, Any]
    optimizers: dict[str, dict[str, Any]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    search_seeds: int
    max_extensions: int
    validation_metric: str
    test_metric: str
    greater_is_better: bool
    tolerance: float
    also_shown: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        """Label of the optimizer that the others are compared with."""
        return next(iter(self.optimizers))

    def spec(self, label: str, learning_rate: float, seed: int) -> Spec:
        """One run of it."""
        own = self.optimizers[label]
        return Spec(self.recipe, label, {**self.arguments, **own, "learning_rate": learning_rate, "seed": seed})

    def search(self, rates: tuple[float, ...]) -> list[Spec]:
        """The runs among which a learning rate is chosen."""
        seeds = self.seeds[: self.search_seeds]
        return [self.spec(label, rate, seed) for seed in seeds for rate in rates for label in self.optimizers]

    def words(self) -> list[str]:
        """Every word that any run is given, names in braces as they stand."""
        return [word for spec in self.search(self.learning_rates) for word in spec.command_line()]


_DEFAULTS: dict[str, Any] = {
    "search_seeds": None,
    "max_extensions": 3,
    "validation_metric": "eval_accuracy",
    "test_metric": "test_accuracy",
    "greater_is_better": None,
    "tolerance": 0.002,
    "also_shown": [],
    "arguments": {},
}
_NEEDED = ("recipe", "optimizers", "learning_rates", "seeds")
_KINDS: dict[type, tuple[str, tuple[str, ...]]] = {
    str: ("a word", ("recipe", "validation_metric", "test_metric")),
    dict: ("a mapping", ("optimizers", "arguments")),
    list: ("a list", ("learning_rates", "seeds", "also_shown")),
}
_PER_RUN = ("learning_rate", "learning_rates", "seed", "output_dir")
_FALLING = ("loss", "perplexity")
"""Ends of names of metrics that may be better when they are less: the plan has to say it."""


def load_plan(path: Path) -> Plan:
    """Read and check a comparison.

    Args:
        path: YAML; `recipes/comparisons/` has examples.

    Raises:
        PlanError: It cannot be read, lacks something, or would choose on test data.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{path} must be a mapping with {', '.join(_NEEDED)}")
    known = {*_NEEDED, *_DEFAULTS}
    if unknown := sorted(set(content) - known):
        raise PlanError(f"{path}: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}")
    if missing := [name for name in _NEEDED if not content.get(name)]:
        raise PlanError(f"{path}: {missing[0]} is missing or empty")
    values = {**_DEFAULTS, **content}
    _check_kinds(path, values)
    optimizers = _optimizers(path, values)
    rates = tuple(_number(path, "learning_rates", rate) for rate in values["learning_rates"])
    if any(rate <= 0.0 for rate in rates) or any(low >= high for low, high in pairwise(rates)):
        raise PlanError(f"{path}: learning_rates must be positive and rise, not {list(rates)}")
    seeds = tuple(values["seeds"])
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise PlanError(f"{path}: seeds must be different whole numbers, not {list(seeds)}")
    search_seeds = len(seeds) if values["search_seeds"] is None else values["search_seeds"]
    if type(search_seeds) is not int or not 1 <= search_seeds <= len(seeds):
        raise PlanError(f"{path}: search_seeds must be from 1 to the number of seeds ({len(seeds)})")
    extensions = values["max_extensions"]
    if type(extensions) is not int or extensions < 0:
        raise PlanError(f"{path}: max_extensions must be a whole number of at least 0, not {extensions!r}")
    values["optimizers"] = optimizers
    _refuse_test_data(path, values)
    values |= {
        "name": path.stem,
        "learning_rates": rates,
        "seeds": seeds,
        "search_seeds": search_seeds,
        "greater_is_better": _greater_is_better(path, values),
        "tolerance": _number(path, "tolerance", values["tolerance"]),
        "also_shown": tuple(map(str, values["also_shown"])),
    }
    return Plan(**values)


def _check_kinds(path: Path, values: dict[str, Any]) -> None:
    for kind, (what, names) in _KINDS.items():
        for name in names:
            if not isinstance(values[name], kind):
                raise PlanError(f"{path}: {name} must be {what}, not {values[name]!r}")


def _optimizers(path: Path, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    optimizers = {str(label): {} if own is None else own for label, own in values["optimizers"].items()}
    for label, own in optimizers.items():
        if not isinstance(own, dict):
            raise PlanError(f"{path}: optimizer {label!r} must be a mapping such as {{optim: adatamw}}, not {own!r}")
        if "optim" not in own:
            raise PlanError(f"{path}: optimizer {label!r} does not say its `optim`")
    for where in (values["arguments"], *optimizers.values()):
        if found := [name for name in _PER_RUN if name in where]:
            raise PlanError(f"{path}: {found[0]} is set for each run: take it out of the arguments")
    for (label, own), (other, others) in combinations(optimizers.items(), 2):
        if own == others:
            raise PlanError(f"{path}: optimizers {label!r} and {other!r} are the same runs: take one out")
    return optimizers


def _greater_is_better(path: Path, values: dict[str, Any]) -> bool:
    given = values["greater_is_better"]
    if given is None and not values["validation_metric"].endswith(_FALLING):
        return True
    if not isinstance(given, bool):
        raise PlanError(
            f"{path}: say greater_is_better, true or false, for {values['validation_metric']!r}, not {given!r}"
        )
    return given


def _refuse_test_data(path: Path, values: dict[str, Any]) -> None:
    chosen_by = values["validation_metric"]
    if chosen_by == values["test_metric"] or chosen_by.startswith("test_"):
        raise PlanError(
            f"{path}: validation_metric {chosen_by!r} is of the test data, on which no learning rate may be chosen"
        )
    for own in values["optimizers"].values():
        files = {**values["arguments"], **own}
        test, validation = (files.get(name) for name in ("test_file", "validation_file"))
        if test is not None and validation is not None and normpath(str(test)) == normpath(str(validation)):
            raise PlanError(f"{path}: validation_file is the test_file, on which no learning rate may be chosen")


def _number(path: Path, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise PlanError(f"{path}: {name} must be numbers, not {value!r}")
    return number
