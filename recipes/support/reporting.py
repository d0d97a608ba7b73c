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
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_tam
from recipes.support.models import count_parameters

_REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate")


class MetricsFileCallback(TrainerCallback):
    """Appends every log event to a file as one JSON object a line, whatever `report_to` says."""

    def __init__(self, path: Path) -> None:
        """Log to `path`, whose folder is created when training begins."""
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Drop what a killed run had logged after the step that this one continues from."""
        if not state.is_world_process_zero:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_metrics(self._path) if state.global_step else []
        kept = [row for row in earlier if row["step"] <= state.global_step]
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        os.replace(partial, self._path)

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
            row = {"step": state.global_step, "epoch": state.epoch, **(logs or {})}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(row)}\n")


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
    versions = {name: version(name) for name in _REPORTED_PACKAGES}
    content = {
        **results,
        "settings": {type(group).__name__: _changed_settings(group) for group in arguments},
        "environment": {"python": platform.python_version(), "threads": torch.get_num_threads(), **versions},
    }
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _changed_settings(group: Any) -> dict[str, Any]:
    """Every argument of a group; of TrainingArguments, which has 130, those that differ from their default."""
    if not isinstance(group, TrainingArguments):
        return dataclasses.asdict(group)
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


def describe_run(trainer: Trainer, *, seconds: float) -> dict[str, Any]:
    """Return what was trained and by which optimizer; `damping_mean` is there if the optimizer is one of ours."""
    trained, total = count_parameters(trainer.model)
    return {
        **describe_optimizer(trainer.optimizer),
        "trained_parameters": f"{trained:,} of {total:,}",
        "training_records": len(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
    }


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Return the name of the optimizer and, if it is one of ours, its mean damping (0.5 weighs as AdamW does)."""
    inner = getattr(optimizer, "optimizer", optimizer)
    description: dict[str, Any] = {"optimizer": type(inner).__name__}
    if isinstance(inner, hf_tam.AdaTAMW | hf_tam.AdaTAM | hf_tam.TAM):
        description["damping_mean"] = round(float(inner.torque_stats()["damping"].mean()), 4)
    return description


def print_table(title: str, rows: dict[str, Any]) -> None:
    """Print `rows` as two aligned columns under `title`."""
    width = max(len(name) for name in rows)
    print(f"\n{title}\n{'-' * len(title)}")
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")
