"""The rows of a comparison, on the disk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import BinaryIO

from hf_tam.lab.compare.choosing import Row
from hf_tam.lab.compare.plan import Plan, PlanError, Spec

__all__ = ["ROWS_NAME", "Journal"]

ROWS_NAME = "rows.jsonl"
_NEEDED = {"key", "learning_rate", "seed", "metrics", "command"}


class Journal:
    """The rows of a comparison, in a file that only grows, and that reading leaves as it is."""

    def __init__(self, path: Path) -> None:
        """Read the rows there are.

        Args:
            path: JSON lines; need not exist. A last line that was cut off by a full disk or a kill is left out.

        Raises:
            PlanError: A line is no row.
        """
        self.path, self._lock = path, threading.Lock()
        self._rows: dict[tuple[str, str], Row] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            row = _row_of(line)
            if row is not None:
                self._rows[_recipe_of(row), row["key"]] = row
            elif number < len(lines) or line.endswith(b"\n"):
                raise PlanError(f"{path}, line {number}, is not a row of a comparison: {line[:80]!r}")

    def of(self, plan: Plan) -> list[Row]:
        """The rows of this plan's settings, under its labels, whatever else the file holds."""
        return [{**row, "label": label} for row in self._rows.values() if (label := _label_of(plan, row)) is not None]

    def missing(self, specs: Iterable[Spec]) -> list[Spec]:
        """Those that have no row yet."""
        return [spec for spec in specs if (spec.recipe, spec.key) not in self._rows]

    def add(self, row: Row) -> None:
        """Keep a row, on the disk before anything else happens."""
        with self._lock:
            with self.path.open("a+b") as file:
                _mend(file)
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._rows[_recipe_of(row), row["key"]] = row


def _mend(file: BinaryIO) -> None:
    """End the file with a whole line: what a kill or a full disk has left of one goes."""
    file.seek(0)
    content = file.read()
    kept = content.rfind(b"\n") + 1
    if _row_of(content[kept:]) is not None:
        file.write(b"\n")
    else:
        file.truncate(kept)


def _row_of(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and set(row) >= _NEEDED else None


def _recipe_of(row: Row) -> str:
    """Name of the script; a row of an older version has it in its command alone."""
    return str(row["recipe"]) if "recipe" in row else PurePath(row["command"].split()[1]).stem


def _label_of(plan: Plan, row: Row) -> str | None:
    """What the plan calls the optimizer of this row, whatever it was called then; None for a row of another plan."""
    if _recipe_of(row) != plan.recipe:
        return None
    keys = {plan.spec(label, row["learning_rate"], row["seed"]).key: label for label in plan.optimizers}
    return keys.get(row["key"])
