"""Reads what runs left in their folders: results.json, metrics.jsonl, torque.jsonl and trainer_state.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where a run is written and what it is called says nothing of how it was trained.
_NOT_SETTINGS = frozenset({"output_dir", "logging_dir", "run_name", "overwrite", "metrics_file", "disable_tqdm"})
SEEDS = frozenset({"seed", "data_seed"})


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
    """

    name: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    torque: list[dict[str, Any]]
    notices: list[str] = field(default_factory=list)

    def series(self, key: str) -> dict[int, float]:
        """The numbers logged as `key`, by step; the last one counts."""
        return {row["step"]: float(row[key]) for row in self.metrics if _is_number(row.get(key))}


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
    return ["/".join(path[-length:]) for path in parts]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder: give the output_dir of a run.")
    results = _read_object(folder / "results.json")
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
    if results is None:
        notices.append(f"{name} has no results.json: its settings are only what trainer_state.json tells.")
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
    settings = _settings(results, state or {})
    return Run(name, settings, _facts(results, metrics), metrics, torque or [], notices)


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


def _settings(results: dict[str, Any] | None, state: dict[str, Any]) -> dict[str, Any]:
    if results is None:
        return {key: state[key] for key in ("max_steps", "num_train_epochs", "train_batch_size") if key in state}
    groups = results.get("settings")
    flat = {} if not isinstance(groups, dict) else {
        key: value for group in groups.values() if isinstance(group, dict) for key, value in group.items()
    }  # fmt: skip
    return {key: value for key, value in flat.items() if key not in _NOT_SETTINGS}


def _facts(results: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Of results.json, else the last of everything that was logged."""
    if results is not None:
        return {key: value for key, value in results.items() if isinstance(value, (str, int, float))}
    return {key: value for row in metrics for key, value in row.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
