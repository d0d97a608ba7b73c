"""`hf-tam compare`: optimizers on the same learning rates and seeds, chosen on validation and told on test data."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_tam.lab.compare.plan import Plan

_NEEDED = {"yaml": "pyyaml", "scipy": "scipy", "filelock": "filelock"}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="compare optimizers: one grid, several seeds, a table with intervals",
        epilog="Runs that have a row in DIR/rows.jsonl are not done again: stop it when you like, and go on later.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="YAML file, as in recipes/comparisons/")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for rows and logs; default: outputs/compare/NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    parser.add_argument("--threads", type=int, help="of each run; default: the cores, shared by the jobs")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: Ray Tune, several machines")
    parser.add_argument(
        "--place", action="append", default=[], metavar="NAME=PATH", help="what stands for {NAME} in the plan"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the rows there are, run nothing")
    parser.set_defaults(command=compare)


def compare(parsed: argparse.Namespace) -> int:
    """Do what is missing, and print the tables.

    Returns:
        1 if a run failed or the plan cannot be used, 2 if a package is missing, else 0.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    missing += ["ray[tune]"] if parsed.engine == "ray" and importlib.util.find_spec("ray") is None else []
    if missing:
        return _complain(f'needs {" and ".join(missing)}: pip install "hf-tam[compare]" {" ".join(missing)}', code=2)
    from hf_tam.lab.compare import choosing, printing, running
    from hf_tam.lab.compare.journal import ROWS_NAME, Journal
    from hf_tam.lab.compare.plan import PlanError, load_plan

    # A batch system ends a job by SIGTERM, a terminal that goes by SIGHUP; the runs must end with it.
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        plan = load_plan(parsed.plan)
        folder = parsed.output or Path("outputs", "compare", plan.name)
        if parsed.table:
            journal = Journal(folder / ROWS_NAME)
        else:
            workshop = _workshop(plan, folder, parsed)
            with _alone_in(folder):
                _keep_places(folder, workshop.places)
                journal = Journal(folder / ROWS_NAME)
                running.compare(plan, journal, partial(_engine(parsed.engine), workshop), workshop.announce)
        results = choosing.outcomes(plan, journal.of(plan))
    except (PlanError, running.RunError, OSError) as error:
        return _complain(str(error), code=1)
    except KeyboardInterrupt:
        return _complain("stopped; the rows that were finished are kept, and the same command goes on", code=130)
    tables = (printing.table(plan, results), printing.curves(plan, results), printing.summary(plan, results))
    text = "\n\n".join(tables)
    print(text)
    if not parsed.table:
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    return 0


def _engine(name: str) -> Any:
    if name == "ray":
        from hf_tam.lab.compare.on_ray import with_ray

        return with_ray
    from hf_tam.lab.compare.running import locally

    return locally


def _workshop(plan: Plan, folder: Path, parsed: argparse.Namespace) -> Any:
    from hf_tam.cli.recipe_files import find_folder
    from hf_tam.lab.compare.plan import PlanError
    from hf_tam.lab.compare.running import Workshop

    places = {}
    for word in parsed.place:
        name, equals, place = word.partition("=")
        if not equals or not name:
            raise PlanError(f"--place takes NAME=PATH, not {word!r}")
        places[name] = place
    used = {name for word in plan.words() for name in re.findall(r"\{(\w+)\}", word)}
    if unknown := sorted(used - set(places)):
        raise PlanError(f"the plan has {{{unknown[0]}}}: say what it stands for by --place {unknown[0]}=PATH")
    if unused := sorted(set(places) - used):
        raise PlanError(f"--place {unused[0]}: the plan has no {{{unused[0]}}}")
    recipe = find_folder() / "recipes" / f"{plan.recipe}.py"
    if not recipe.is_file():
        raise PlanError(f"there is no recipe {plan.recipe!r}; `hf-tam recipes list` shows them")
    if parsed.jobs < 1 or (parsed.threads is not None and parsed.threads < 1):
        raise PlanError("--jobs and --threads must be at least 1")
    threads = parsed.threads or max(1, (os.cpu_count() or 1) // parsed.jobs)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = (plan.validation_metric, plan.test_metric)
    announce = partial(print, flush=True)
    return Workshop(recipe, folder.resolve(), threads, places, parsed.jobs, metrics, announce)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two at once would remove each other's runs."""
    from filelock import FileLock, Timeout

    from hf_tam.lab.compare.plan import PlanError

    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise PlanError(f"{folder} is in use by another `hf-tam compare`: wait, or give another --output") from None


def _keep_places(folder: Path, places: dict[str, str]) -> None:
    """Rows do not say where their data lay: the folder does, so that two data sets are not taken for one."""
    from hf_tam.lab.compare.plan import PlanError

    path = folder / "places.json"
    now = {name: str(Path(place).resolve()) if Path(place).exists() else place for name, place in places.items()}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in sorted(set(before) & set(now)):
        if before[name] != now[name]:
            raise PlanError(
                f"{folder} was begun with --place {name}={before[name]}, not {now[name]}: give another --output, or, "
                f"if the content is the same, remove {path}"
            )
    path.write_text(json.dumps({**before, **now}, indent=1) + "\n", encoding="utf-8")


def _complain(message: str, *, code: int) -> int:
    print(f"hf-tam compare: {message}", file=sys.stderr)
    return code
