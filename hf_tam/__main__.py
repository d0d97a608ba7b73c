"""`python -m hf_tam SCRIPT ARGS`: run a script, untouched, with the optimizer names registered.

Works wherever a launcher takes a module: `accelerate launch -m hf_tam SCRIPT ARGS`,
`torchrun ... -m hf_tam SCRIPT ARGS`.
"""

from __future__ import annotations

import io
import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from hf_tam.integrations import autoload

USAGE = "usage: python -m hf_tam SCRIPT [ARGS ...]\n\nRun SCRIPT with --optim adatamw, adatam and tam registered."


def main(arguments: list[str]) -> None:
    """Run a script as `__main__`, as `python SCRIPT ARGS` would.

    Args:
        arguments: The path of the script, then its own arguments.

    Raises:
        SystemExit: With the usage, if no script is named or the path is not a file.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments:
        raise SystemExit(USAGE)
    script = os.path.abspath(arguments[0])
    if not os.path.isfile(script):
        raise SystemExit(f"{USAGE}\n\nhf_tam: {arguments[0]} is not a file.")
    autoload.install()
    autoload.extend_to_children(os.environ)
    sys.argv[:] = arguments
    if not getattr(sys.flags, "safe_path", False):  # `python -P`, Python >= 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    _run_as_main(script)


def _run_as_main(script: str) -> None:
    """Execute the script in a module of its own that takes the place of `__main__` for good.

    Pickles refer to its classes as `__main__.NAME`, and spawned workers import the script anew by its `__file__`.
    """
    module = ModuleType("__main__")
    module.__file__ = script
    module.__loader__ = SourceFileLoader("__main__", script)
    module.__dict__["__builtins__"] = __builtins__
    with io.open_code(script) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)  # not our own __future__ imports
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


if __name__ == "__main__":
    main(sys.argv[1:])
