"""The runs of a comparison: each a process of its own, each leaving one row, and none that has a row done again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tam.compare.choosing import Row, best_rate, extended
from hf_tam.compare.plan import Plan, PlanError, Spec

__all__ = ["Journal", "RunError", "Workshop", "compare"]

ROWS_NAME = "rows.jsonl"
_LAST_WORDS = 2000
"""Of a run's output that its error message may quote, in characters."""


class RunError(Exception):
    """A run ended without results; one sentence says which and why."""


class Journal:
    """The rows of a comparison, in a file that only grows."""

    def __init__(self, path: Path) -> None:
        """Read the rows there are.

        Args:
            path: JSON lines; need not exist.

        Raises:
            PlanError: A line is no row; a last line that was cut off by a full disk or a kill is left out.
        """
        self.path, self._lock = path, threading.Lock()
        self._rows: dict[str, Row] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._rows[row["key"]] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n"):
                    path.write_text("".join(lines[:-1]), encoding="utf-8")
                    break
                raise PlanError(f"{path}, line {number}, is not a row of a comparison: {line[:80]!r}") from error

    def of(self, plan: Plan) -> list[Row]:
        """The rows of this plan's settings, whatever else the file holds."""
        return [row for row in self._rows.values() if _is_of(plan, row)]

    def missing(self, specs: Iterable[Spec]) -> list[Spec]:
        """Those that have no row yet."""
        return [spec for spec in specs if spec.key not in self._rows]

    def add(self, row: Row) -> None:
        """Keep a row, on the disk before anything else happens."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            self._rows[row["key"]] = row


def _is_of(plan: Plan, row: Row) -> bool:
    return row["label"] in plan.optimizers and (
        plan.spec(row["label"], row["learning_rate"], row["seed"]).key == row["key"]
    )


@dataclass
class Workshop:
    """Where and how runs are done.

    Attributes:
        recipe: The script.
        folder: For their output; a run's own is removed when its row is kept.
        threads: For each run.
        places: What stands for a name in braces in the plan's arguments, for example {"minilm": "/models/minilm"}.
        jobs: How many runs at a time.
        metrics: What its results must have.
    """

    recipe: Path
    folder: Path
    threads: int
    places: dict[str, str]
    jobs: int
    metrics: tuple[str, ...]

    def run(self, spec: Spec) -> Row:
        """Do one run.

        Raises:
            RunError: It ended without results.
        """
        output_dir, log = self.folder / spec.key, self.folder / f"{spec.key}.log"
        shutil.rmtree(output_dir, ignore_errors=True)  # of a run that was cut off
        words = [self._filled(word) for word in spec.command_line()]
        command = [sys.executable, str(self.recipe), *words, f"--output_dir={output_dir}"]
        started = time.perf_counter()
        with log.open("wb") as output:
            status = _run(command, output, {**os.environ, "OMP_NUM_THREADS": str(self.threads)})
        seconds = time.perf_counter() - started
        results_path = output_dir / "results.json"
        if status != 0 or not results_path.is_file():
            words_left = log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:].strip().splitlines()
            reason = words_left[-1] if words_left else "it said nothing"
            raise RunError(f"{_describe(spec)} ended with status {status}: {reason} (all of it: {log})")
        results = json.loads(results_path.read_text(encoding="utf-8"))
        if absent := [name for name in self.metrics if name not in results]:
            there = ", ".join(name for name, value in results.items() if type(value) is float)
            raise RunError(f"{_describe(spec)} has no metric {absent[0]!r} in its results.json; it has {there}")
        shutil.rmtree(output_dir, ignore_errors=True)
        return _row(spec, results, seconds=seconds, recipe=self.recipe.name)

    def _filled(self, word: str) -> str:
        for name, place in self.places.items():
            word = word.replace(f"{{{name}}}", place)
        return word


_CHILDREN: set[subprocess.Popen[bytes]] = set()


def _run(command: list[str], output: Any, environment: dict[str, str]) -> int:
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as child:
        _CHILDREN.add(child)
        try:
            return child.wait()
        finally:
            child.kill()
            _CHILDREN.discard(child)


def _end_children() -> None:
    for child in list(_CHILDREN):
        child.terminate()


def _row(spec: Spec, results: dict[str, Any], *, seconds: float, recipe: str) -> Row:
    return {
        "key": spec.key,
        "label": spec.label,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        "optimizer": results.get("optimizer"),
        "metrics": {name: value for name, value in results.items() if type(value) in (int, float)},
        "command": shlex.join(["python", f"recipes/{recipe}", *spec.command_line()]),
        "environment": results.get("environment"),
        "seconds": round(seconds, 1),
    }


def _describe(spec: Spec) -> str:
    return f"{spec.label}, learning rate {spec.learning_rate:g}, seed {spec.seed}"


def compare(
    plan: Plan,
    journal: Journal,
    execute: Callable[[Sequence[Spec], Callable[[Row], None]], None],
    announce: Callable[[str], None],
) -> list[Row]:
    """Do the runs that have no row: the search, a longer grid where a best rate lies at its end, the other seeds.

    Args:
        plan: What to compare.
        journal: Where the rows are and go.
        execute: Does some runs and hands over each row as it comes.
        announce: Takes lines for the user.

    Returns:
        All rows of the plan.
    """
    rates, extensions = plan.learning_rates, 0
    while True:
        _do(journal, plan.search(rates), execute, announce)
        longer = extended(plan, journal.of(plan), rates)
        if longer == rates or extensions == plan.max_extensions:
            break
        added = ", ".join(f"{rate:g}" for rate in longer if rate not in rates)
        announce(f"a best learning rate lies at an end of the grid: all optimizers are run at {added} too")
        rates, extensions = longer, extensions + 1
    best = {label: best_rate(plan, journal.of(plan), label) for label in plan.optimizers}
    _do(
        journal,
        [plan.spec(label, rate, seed) for seed in plan.seeds for label, rate in best.items()],
        execute,
        announce,
    )
    return journal.of(plan)


def _do(
    journal: Journal,
    specs: Sequence[Spec],
    execute: Callable[[Sequence[Spec], Callable[[Row], None]], None],
    announce: Callable[[str], None],
) -> None:
    missing, done = journal.missing(specs), 0

    def keep(row: Row) -> None:
        nonlocal done
        done += 1
        journal.add(row)
        announce(
            f"{done} of {len(missing)}: {row['label']}, learning rate {row['learning_rate']:g}, seed {row['seed']}"
            f" ({row['seconds']:.0f} s)"
        )

    if missing:
        execute(missing, keep)


def locally(workshop: Workshop, specs: Sequence[Spec], keep: Callable[[Row], None]) -> None:
    """Do runs on this machine, `workshop.jobs` at a time.

    Raises:
        RunError: Some ended without results; the others were done first, and their rows kept.
    """
    failures = []
    with ThreadPoolExecutor(workshop.jobs) as pool:
        futures = [pool.submit(workshop.run, spec) for spec in specs]
        try:
            for future in as_completed(futures):
                try:
                    keep(future.result())
                except RunError as error:
                    failures.append(str(error))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _end_children()
            raise
    if failures:
        raise RunError(f"{len(failures)} of {len(specs)} runs failed; the first: {failures[0]}")
