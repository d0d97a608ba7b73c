"""The `hf-tam` command: one module a subcommand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_tam.cli import activate, bench, compare, deactivate, recipes, report, run, status


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; each subcommand sets `command`, the function that runs it."""
    parser = argparse.ArgumentParser(prog="hf-tam", description="Make --optim adatamw, adatam and tam known.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in (run, activate, deactivate, status, recipes, report, bench, compare):
        subcommand.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Defaults to those of the process.

    Returns:
        The exit status.
    """
    parsed = make_parser().parse_args(arguments)
    status_code: int = parsed.command(parsed)
    return status_code
