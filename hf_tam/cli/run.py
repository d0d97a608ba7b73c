"""`hf-tam run -- COMMAND`: any command, with the names registered in every Python below it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hf_tam.integrations import autoload
from hf_tam.integrations.switches import KILL_SWITCH


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "run",
        help="run a command with the names registered in every Python that it starts",
        usage="hf-tam run -- COMMAND [ARGS ...]",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    parser.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Replace this process by the command.

    Returns:
        2 if there is nothing to run or the kill switch is set; 126 or 127, as a shell, if the command cannot start.
    """
    words = parsed.words[1:] if parsed.words[:1] == ["--"] else parsed.words
    if not words:
        return _complain("nothing to run; use: hf-tam run -- COMMAND [ARGS ...]", code=2)
    if autoload.is_switched_off():
        return _complain(f"{KILL_SWITCH}=0 is set, so nothing would be registered; unset it", code=2)
    environment = dict(os.environ)
    autoload.extend_to_children(environment)
    try:
        os.execvpe(words[0], words, environment)
    except FileNotFoundError:
        return _complain(f"no command {words[0]!r} on PATH", code=127)
    except OSError as error:
        return _complain(f"{words[0]!r} cannot be run: {error.strerror}", code=126)


def _complain(message: str, *, code: int) -> int:
    print(f"hf-tam run: {message}", file=sys.stderr)
    return code
