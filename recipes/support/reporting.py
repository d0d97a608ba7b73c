"""What a run leaves behind for people: metrics.jsonl, results.json and a table on the terminal."""

import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_tam
from hf_tam.lab.bench.machine import describe_machine

_REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate")


class MetricsFile:
    """A file to which every log event is appended as one JSON object a line."""

    def __init__(self, path: Path) -> None:
        """Log to `path`, whose folder is created by `begin`."""
        self._path = path

    def begin(self, *, step: int) -> None:
        """Drop what a killed run had logged after `step`, from which this one continues; 0: start an empty file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_metrics(self._path) if step else []
        kept = [row for row in earlier if row["step"] <= step]
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        os.replace(partial, self._path)

    def append(self, row: dict[str, Any]) -> None:
        """Append one event."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")


class MetricsFileCallback(TrainerCallback):
    """Appends every log event of the Trainer to a metrics file, whatever `report_to` says."""

    def __init__(self, path: Path) -> None:
        """Log to `path`."""
        self._file = MetricsFile(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin the file at the step that training begins at."""
        if state.is_world_process_zero:
            self._file.begin(step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Append `logs` with their step and epoch."""
        if state.is_world_process_zero:
            self._file.append({"step": state.global_step, "epoch": state.epoch, **(logs or {})})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a killed process cut short is dropped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_results(path: Path, results: dict[str, Any], arguments: tuple[Any, ...]) -> None:
    """Write `results` with the settings and versions they were measured with, whole or not at all."""
    content = {
        **results,
        "settings": {type(group).__name__: changed_settings(group) for group in arguments},
        "environment": {"device": _device_name(arguments), "threads": torch.get_num_threads(), **versions()},
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _device_name(arguments: tuple[Any, ...]) -> str:
    trains_on = next((group.device.type for group in arguments if isinstance(group, TrainingArguments)), "cpu")
    machine = describe_machine()
    return str(machine["cpu"] if trains_on == "cpu" else machine["gpu"] or trains_on)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _REPORTED_PACKAGES}}


def changed_settings(group: Any) -> dict[str, Any]:
    """Every argument of a group; of TrainingArguments, which has 130, those that differ from their default."""
    if not isinstance(group, TrainingArguments):
        return {field.name: getattr(group, field.name) for field in dataclasses.fields(group) if field.init}
    fields = [field for field in dataclasses.fields(group) if field.init and not field.name.endswith("_token")]
    return {field.name: getattr(group, field.name) for field in fields if getattr(group, field.name) != field.default}


def announce(message: str) -> None:
    """Print `message` once, however many processes run; torchrun and accelerate number them in RANK."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning about the data on the terminal's error stream, once."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def describe_run(
    optimizer: Any, sizes: tuple[int, int], *, strategy: str, num_records: int, num_steps: int, seconds: float
) -> dict[str, Any]:
    """Return what was trained and by which optimizer; `damping_mean` is there if the optimizer is one of ours.

    Args:
        optimizer: as accelerate returned it.
        sizes: how many parameters were trained and how many there are, counted before the model was wrapped.
        strategy: how the processes shared the work.
        num_records: records trained on.
        num_steps: optimizer steps.
        seconds: wall time of the run.
    """
    trained, total = sizes
    return {
        **_describe_optimizer(optimizer),
        "strategy": strategy,
        "trained_parameters": f"{trained:,} of {total:,}",
        "training_records": num_records,
        "steps": num_steps,
        "seconds": round(seconds, 1),
    }


def _describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the name of the optimizer and, if it is one of ours, its mean damping (0.5 weighs as AdamW does)."""
    # accelerate wraps it, and DeepSpeed's ZeRO inside that once more.
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    description: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    if isinstance(optimizer, hf_tam.AdaTAMW | hf_tam.AdaTAM | hf_tam.TAM):
        description["damping_mean"] = round(float(optimizer.torque_stats()["damping"].mean()), 4)
    return description


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print `rows` as two aligned columns under `title`."""
    width = max(len(name) for name in rows)
    print(f"\n{title}\n{'-' * len(title)}")
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
