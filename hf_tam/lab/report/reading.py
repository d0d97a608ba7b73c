"""Reads what runs left: results.json, arguments.json, metrics.jsonl, torque.jsonl and trainer_state.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where a run is written and what it is called says nothing of how it was trained.
_NOT_SETTINGS = frozenset({"output_dir", "logging_dir", "run_name", "overwrite", "metrics_file", "disable_tqdm"})
SEEDS = frozenset({"seed", "data_seed"})
# What tells two runs of a plain Trainer apart, whose folders name no argument in a form that may be opened.
LOGGED_RATE = "learning_rate (largest logged)"
# What TRL's trainers of preferences log, and with the prefix of an evaluation.
REWARDS = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
_LONG_NAME = 40


class ReportError(Exception):
    """The report cannot be made: one sentence that says why, and what to do."""


@dataclass
class Run:
    """One run.

    Attributes:
        name: What it is called on the page, unlike any other's.
        settings: Arguments by name.
        facts: Final metrics and what else is known, by name.
        metrics: The values of every logging step.
        torque: The rows of torque.jsonl.
        notices: What is missing or was passed over.
        is_partial: Whether a setting that is not there may have had any value.
    """

    name: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    torque: list[dict[str, Any]]
    notices: list[str] = field(default_factory=list)
    is_partial: bool = False

    def series(self, key: str) -> dict[int, float]:
        """The numbers logged as `key`, NaN and infinities too, by step; the last one counts."""
        logged = ((row["step"], as_number(row[key])) for row in self.metrics if key in row)
        return {step: number for step, number in logged if number is not None}

    def keys(self) -> list[str]:
        """The names of what was logged."""
        return list(dict.fromkeys(key for row in self.metrics for key in row if key not in ("step", "epoch")))


def as_number(value: object) -> float | None:
    """A logged value as a number; NaN for null, which writers put who hold to JSON; None where it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)  # "NaN" and "Infinity" are found as strings, too
    except (ValueError, OverflowError):
        return None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run.

    Raises:
        ReportError: A folder does not exist or holds no run, or a file in it is damaged.
    """
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ReportError("a RUN is given twice: name each folder once.")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    if max(len("/".join(path[-length:])) for path in parts) <= _LONG_NAME:
        return ["/".join(path[-length:]) for path in parts]
    shared = {place for place in range(1 - length, -1) if len({path[place:][:1] for path in parts}) == 1}
    return [_without(shared, path[-length:]) for path in parts]


def _without(shared: set[int], path: tuple[str, ...]) -> str:
    """A path without the folders in its middle that all paths have: what tells it from them is seen at once."""
    marked = ["…" if place - len(path) in shared else part for place, part in enumerate(path)]
    return "/".join(part for part, before in zip(marked, ["", *marked], strict=False) if (part, before) != ("…", "…"))


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: give the output_dir of a run.")
    results = _read_object(folder / "results.json")
    arguments = _read_object(folder / "arguments.json")
    state = _read_trainer_state(folder)
    metrics = _read_rows(folder / "metrics.jsonl")
    torque = _read_rows(folder / "torque.jsonl")
    if results is None and state is None and metrics is None and torque is None:
        raise ReportError(
            f"{folder} holds no run: it has no results.json, metrics.jsonl, torque.jsonl or trainer_state.json."
        )
    notices = []
    if metrics is None:
        metrics = _checked(state.get("log_history", []), folder / "trainer_state.json") if state is not None else []
        if not metrics:
            notices.append(f"{name} has neither metrics.jsonl nor trainer_state.json: its curves are missing.")
    metrics, replaced = _unfiltered(metrics)
    if replaced:
        notices.append(
            f"{name} logged a loss of 0 with a grad_norm that is not finite, first at step {replaced[0]}: it stands "
            "for NaN, and is drawn as such. With logging_nan_inf_filter=false the Trainer logs what it was."
        )
    if results is None:
        source = "what trainer_state.json tells" if arguments is None else "those of arguments.json"
        notices.append(f"{name} has no results.json: its settings are only {source}.")
    if torque and _is_anothers(metrics):
        notices.append(
            f"{name} has a torque.jsonl, and logged no torque: the file is of an earlier run into this folder, and is "
            "left out."
        )
        torque = []
    elif torque is None:
        notices.append(f"{name} has no torque.jsonl: there is no heatmap of it.")
    elif not all(isinstance(row.get("group"), str) for row in torque):
        raise ReportError(f"{folder / 'torque.jsonl'} has a row without a group: remove the file.")
    settings = _flat(results, arguments) or _logged_settings(state or {}, metrics)
    return Run(name, settings, _facts(results, metrics), metrics, torque or [], notices, is_partial=results is None)


def _unfiltered(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows with NaN where the Trainer logged 0 for it, its default, and the steps of these."""
    replaced = [row["step"] for row in rows if row.get("loss") == 0.0 and not _is_finite(row.get("grad_norm", 0.0))]
    return [row | {"loss": math.nan} if row["step"] in replaced and "loss" in row else row for row in rows], replaced


def _is_finite(value: object) -> bool:
    number = as_number(value)
    return number is None or math.isfinite(number)


def _is_anothers(metrics: list[dict[str, Any]]) -> bool:
    """Whether a torque.jsonl beside these metrics was left by another run: who writes it logs the torque as well."""
    trained = [row for row in metrics if "loss" in row]
    return bool(trained) and not any(key.startswith("torque/") for row in metrics for key in row)


def _read_object(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}): repair it, or remove it to do without.") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds no JSON object: repair it, or remove it to do without.")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]] | None:
    """Rows of a JSON lines file; a last line that a killed process cut short is dropped."""
    text = _read_text(path)
    if text is None:
        return None
    rows, lines = [], text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no line end after it
                break
            raise ReportError(f"{path}, line {number}, is not JSON: repair it, or remove the file.") from error
    return _checked(rows, path)


def _checked(rows: Any, path: Path) -> list[dict[str, Any]]:
    is_list = isinstance(rows, list)
    if not is_list or not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise ReportError(f"{path} has a row without a step: repair it, or remove the file.")
    return list(rows)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not text in UTF-8: repair it, or remove it to do without.") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error


def _read_trainer_state(folder: Path) -> dict[str, Any] | None:
    """The Trainer's own log: in the folder, or in its newest checkpoint."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    checkpoints = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for place in (folder, *checkpoints):
        state = _read_object(place / "trainer_state.json")
        if state is not None:
            return state
    return None


def _flat(results: dict[str, Any] | None, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of results.json, and over them the arguments as they were given."""
    groups = (results or {}).get("settings")
    flat = {} if not isinstance(groups, dict) else {
        key: value for group in groups.values() if isinstance(group, dict) for key, value in group.items()
    }  # fmt: skip
    return {key: value for key, value in {**flat, **(arguments or {})}.items() if key not in _NOT_SETTINGS}


def _logged_settings(state: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [row["learning_rate"] for row in metrics if _is_number(row.get("learning_rate"))]
    known: dict[str, Any] = {LOGGED_RATE: max(rates)} if rates else {}
    return {key: state[key] for key in ("max_steps", "num_train_epochs", "train_batch_size") if key in state} | known


def _facts(results: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Of results.json, and the last rewards that were logged; without it the last of everything that was logged."""
    numbers = ((key, value, as_number(value)) for row in metrics for key, value in row.items())
    logged = {key: value if _is_number(value) else number for key, value, number in numbers if number is not None}
    if results is None:
        return logged
    rewards = {key: value for key, value in logged.items() if key.endswith(REWARDS)}
    return rewards | {key: value for key, value in results.items() if isinstance(value, (str, int, float, type(None)))}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
