"""`hf-tam report`: the curves, dampings and settings of runs on one page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("report", help="draw runs: loss, evaluation, damping by layer, settings, speed")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page; its PNGs go beside it")
    parser.add_argument(
        "--group-by", metavar="SETTING", help="draw runs together that agree in it; default: all but seed"
    )
    parser.set_defaults(command=report)


def report(parsed: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        1 if a run cannot be read or the page not be written, 2 if a package is missing, else 0.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        return _complain(f'needs {" and ".join(missing)}: pip install "hf-tam[report]"', code=2)
    from hf_tam.lab.report.page import write_report
    from hf_tam.lab.report.reading import ReportError

    try:
        page, *pictures = write_report(parsed.runs, parsed.output, by=parsed.group_by)
    except ReportError as error:
        return _complain(str(error), code=1)
    print(f"wrote {page} and {len(pictures)} pictures beside it")
    return 0


def _complain(message: str, *, code: int) -> int:
    print(f"hf-tam report: {message}", file=sys.stderr)
    return code
