"""`hf-tam deactivate`: undo `hf-tam activate`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_tam.cli.activate import hook_path


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("deactivate", help="undo `hf-tam activate`")
    parser.set_defaults(command=deactivate)


def deactivate(parsed: argparse.Namespace) -> int:
    """Remove the hook.

    Returns:
        1 if it cannot be removed, else 0, also if there was none.
    """
    path = hook_path()
    try:
        path.unlink()
    except FileNotFoundError:
        print(f"not active: there is no {path}")
    except OSError as error:
        print(f"hf-tam deactivate: cannot remove {path}: {error.strerror}", file=sys.stderr)
        return 1
    else:
        print(f"removed {path}")
    return 0
