"""The runs of a comparison: each a process of its own, each leaving one row, and none that has a row done again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tam.lab.compare.choosing import Row, best_rate, extended
from hf_tam.lab.compare.journal import Journal
from hf_tam.lab.compare.plan import Plan, Spec

__all__ = ["RunError", "Workshop", "compare", "locally"]

_LAST_WORDS = 2000
"""Of a run's output that its error message may quote, in characters."""
_ALL_FAIL = 3
"""So many failures, or one for each job, and no success: the rest would fail too."""


class RunError(Exception):
    """A run ended without results; one sentence says which and why."""


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
        announce: Takes lines for the user.
    """

    recipe: Path
    folder: Path
    threads: int
    places: dict[str, str]
    jobs: int
    metrics: tuple[str, ...]
    announce: Callable[[str], None] = print

    def run(self, spec: Spec) -> Row:
        """Do one run.

        Raises:
            RunError: It ended without results.
        """
        for left in self.folder.glob(f"{spec.key}-*"):  # by a run that was cut off
            shutil.rmtree(left, ignore_errors=True)
        # A run that has outlived its parent may still write to a folder of its own, not to this one.
        output_dir, log = self.folder / f"{spec.key}-{os.getpid()}", self.folder / f"{spec.key}.log"
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
            child.kill()  # where the wait was interrupted
            _CHILDREN.discard(child)


def _end_children() -> None:
    for child in list(_CHILDREN):
        child.terminate()


def _row(spec: Spec, results: dict[str, Any], *, seconds: float, recipe: str) -> Row:
    return {
        "key": spec.key,
        "recipe": spec.recipe,
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
        RunError: Some ended without results; the others were done first, and their rows kept, unless none went well.
    """
    failures, succeeded = [], False
    with ThreadPoolExecutor(workshop.jobs) as pool:
        futures = [pool.submit(workshop.run, spec) for spec in specs]
        try:
            for future in as_completed(futures):
                try:
                    keep(future.result())
                    succeeded = True
                except RunError as error:
                    failures.append(str(error))
                    workshop.announce(f"failed: {error}")
                    if not succeeded and len(failures) == max(_ALL_FAIL, workshop.jobs) < len(specs):
                        count = len(failures)
                        raise RunError(f"the first {count} runs all failed; the first: {failures[0]}") from None
        except BaseException:
            # Ctrl-C, as which the command takes SIGTERM too: the runs are to end with it.
            pool.shutdown(wait=False, cancel_futures=True)
            _end_children()
            raise
    if failures:
        raise RunError(f"{len(failures)} of {len(specs)} runs failed; the first: {failures[0]}")
