"""`hf-tam activate`: register the names in every Python of this environment, until `hf-tam deactivate`."""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

HOOK_NAME = "hf_tam_autoload.pth"
# Python executes the lines of a .pth file that begin with "import", and skips those that begin with "#".
HOOK_TEXT = """\
# Written by `hf-tam activate`; `hf-tam deactivate` removes it, HF_TAM_AUTOLOAD=0 switches it off for one process.
# When a program imports transformers, this makes --optim adatamw, adatam and tam known to it.
import os, sys; \
os.environ.get("HF_TAM_AUTOLOAD") != "0" \
and any(finder.find_spec("hf_tam", None) for finder in sys.meta_path) \
and __import__("hf_tam")
"""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("activate", help="register the names in every Python of this environment")
    parser.set_defaults(command=activate)


def hook_path() -> Path:
    """Where the hook belongs: the site-packages of the running environment."""
    return Path(sysconfig.get_path("purelib")) / HOOK_NAME


def activate(parsed: argparse.Namespace) -> int:
    """Write the hook.

    Returns:
        1 if it cannot be written, else 0.
    """
    path = hook_path()
    try:
        path.write_text(HOOK_TEXT, encoding="utf-8")
    except OSError as error:
        print(f"hf-tam activate: cannot write {path}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    print("Every Python of this environment now knows --optim adatamw, adatam and tam; `hf-tam deactivate` undoes it.")
    return 0
