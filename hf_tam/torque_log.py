"""What a log says of the torque: a summary, and one row a layer group in `torque.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_tam.integrations.wrapped import find_ours

FILE_NAME = "torque.jsonl"

_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B",
               "lora_magnitude_vector": "lora_magnitude_vector"}  # fmt: skip
_VECTORS = ("cosine", "damping", "effective_lr", "grad_norms")

logger = logging.getLogger("hf_tam")


class TensorReading(NamedTuple):
    """What the last step saw of one logical tensor. NaN: it took no step, or nothing was measured."""

    group: str
    cosine: float
    damping: float
    effective_lr: float
    grad_norm: float

    @property
    def is_trained(self) -> bool:
        """Whether it took part in the last step or has a torque from an earlier one.

        A frozen base that was handed to the optimizer with its adapter, which is hundreds of tensors at the neutral
        0.5, would hide what the few others do.
        """
        return math.isfinite(self.effective_lr) or self.damping != 0.5


class TorqueReading(NamedTuple):
    """What the last step saw, as numbers of the host."""

    tensors: list[TensorReading]
    skipped: int

    def summary(self) -> dict[str, float]:
        """The values to log, by name.

        Cosine and effective learning rate are means over the tensors that took part in the last step, and left out
        where none did; the damping is that of all tensors that were ever stepped: what is frozen does not count.
        Every tensor counts the same, whatever its size.
        """
        stepped = [tensor for tensor in self.tensors if math.isfinite(tensor.effective_lr)]
        dampings = [tensor.damping for tensor in self.tensors if tensor.is_trained]
        values: dict[str, float | None] = {
            "cosine_mean": _mean(tensor.cosine for tensor in stepped),
            "damping_mean": _mean(dampings),
            "damping_p10": _quantile(dampings, 0.1),
            "damping_p90": _quantile(dampings, 0.9),
            "effective_lr": _mean(tensor.effective_lr for tensor in stepped),
            "skipped": self.skipped,
        }
        for part in ("lora_A", "lora_B"):
            mean = _mean(tensor.damping for tensor in self.tensors if tensor.group.endswith(f".{part}"))
            values[f"{part}_damping_mean"] = mean
        return {f"torque/{name}": value for name, value in values.items() if value is not None}

    def rows(self, *, step: int, epoch: float | None) -> list[dict[str, Any]]:
        """One row a layer group of tensors that were ever stepped, in the order of the parameters; see `group_name`.

        `grad_norm` is after clipping, and of the gradients without NaN and Inf.
        """
        groups: dict[str, list[TensorReading]] = {}
        for tensor in self.tensors:
            if tensor.is_trained:
                groups.setdefault(tensor.group, []).append(tensor)
        return [{"step": step, "epoch": epoch, **_row(name, tensors)} for name, tensors in groups.items()]


def read_torque(optimizer: Any) -> TorqueReading:
    """Read what the last step of an optimizer of ours saw.

    One transfer from the device to the host, which waits for the device. No communication: every rank knows the
    numbers of whole tensors.

    Args:
        optimizer: One of ours, or what accelerate or DeepSpeed have wrapped around one.

    Raises:
        TypeError: It is none of ours.
    """
    ours = find_ours(optimizer)
    if ours is None:
        raise TypeError(f"read_torque takes an optimizer of hf_tam, got {type(optimizer).__name__}")
    stats = ours.torque_stats()
    count = len(stats["names"])
    numbers = torch.cat([*(stats[key] for key in _VECTORS), stats["skipped"].reshape(1).float()]).tolist()
    columns = [numbers[start : start + count] for start in range(0, len(_VECTORS) * count, count or 1)]
    groups = [group_name(name) for name in stats["names"]]
    tensors = [TensorReading(*fields) for fields in zip(groups, *columns, strict=True)] if count else []
    return TorqueReading(tensors, int(numbers[-1]))


def group_name(parameter: str | None) -> str:
    """Name the layer group of a parameter.

    A group is one part of one layer, `model.layers.3.self_attn`; outside of numbered layers it is one module. The
    adapter's matrices are apart: `model.layers.3.self_attn.lora_A`, `...lora_B`.

    Args:
        parameter: Its full name, None where unknown.
    """
    if parameter is None:
        return "(unnamed)"
    parts = parameter.removeprefix(_PEFT_PREFIX).split(".")
    adapter = [_PEFT_PARTS[part] for part in parts if part in _PEFT_PARTS]
    # what follows is the adapter's own name, "default"
    end = next((at for at, part in enumerate(parts) if part in _PEFT_PARTS or part == "modules_to_save"), -1)
    modules = parts[:end] or parts
    first = next((position for position, part in enumerate(modules) if part.isdecimal()), None)
    if first is not None:
        is_numbered = modules[first + 2 : first + 3] and modules[first + 2].isdecimal()  # T5's block.0.layer.1
        modules = modules[: first + (3 if is_numbered else 2)]
    return ".".join([*modules, *adapter[:1]])


class TorqueFile:
    """A `torque.jsonl`. Where it cannot be written there is one warning, and training goes on without it."""

    def __init__(self, path: Path) -> None:
        """Write to `path`; nothing happens before `begin`."""
        self._path = path
        self._failed = False

    def begin(self, *, step: int) -> None:
        """Start an empty file, or drop what a stopped run had written after `step`, from which this one goes on."""
        self._attempt(lambda: self._keep_until(step))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of one logging event."""
        self._attempt(lambda: self._write(rows))

    def _keep_until(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            if step and self._path.exists()
            else []
        )
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in lines if _is_row_until(line, step)), encoding="utf-8")
        os.replace(partial, self._path)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        text = "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except OSError as error:
            self._failed = True
            logger.warning(
                "%s cannot be written (%s): training goes on without it. Make room, or the folder writable.",
                self._path,
                error.strerror,
            )


def _is_row_until(line: str, step: int) -> bool:
    """Whether a line is a whole row of `step` or earlier; a killed process may have cut the last one short."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.get("step", step + 1) <= step


def _row(name: str, tensors: list[TensorReading]) -> dict[str, Any]:
    stepped = [tensor for tensor in tensors if math.isfinite(tensor.effective_lr)]
    dampings = [tensor.damping for tensor in tensors]
    squares = [tensor.grad_norm**2 for tensor in tensors if math.isfinite(tensor.grad_norm)]
    return {
        "group": name,
        "num_tensors": len(tensors),
        "cosine_mean": _mean(tensor.cosine for tensor in stepped),
        "damping_mean": _mean(dampings),
        "damping_min": min(dampings),
        "damping_max": max(dampings),
        "effective_lr": _mean(tensor.effective_lr for tensor in stepped),
        "grad_norm": math.sqrt(math.fsum(squares)) if squares else None,
    }


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item() if values else None
