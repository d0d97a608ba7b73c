"""Check configurations against the recipes' own parsers; `hf-tam recipes validate` runs this.

python -m recipes.support.validate sft=FILE.yaml [classify=FILE.yaml ...]
"""

import contextlib
import functools
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.support import torchless

# Everything else of the recipes imports transformers, which asks once and for all whether there is a torch.

# With torch, for the files that need it; this folder comes before the one that the user is in.
_WHOLE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1));"
    " from recipes.support.validate import main; sys.exit(main(sys.argv[1:], with_torch=True))"
)


def main(argv: list[str] | None = None, *, with_torch: bool = False) -> int:
    """Print a line for each file; returns 1 if one is wrong.

    Args:
        argv: `SCRIPT=FILE` for each, the script without its suffix, or a command of TRL, such as "trl grpo".
        with_torch: Ask the parsers in this process, with all that they import. Otherwise torch is kept out of it, and
            the files that it takes to judge are left to a process that has it.
    """
    words = sys.argv[1:] if argv is None else argv
    if not with_torch:
        try:
            torchless.hide_torch()
        except torchless.NeedsTorchError:
            with_torch = True
    mistakes, left = _judge((word.partition("=")[::2] for word in words), with_torch=with_torch)
    for (script, path), mistake in mistakes.items():
        print(
            f"{path}: {mistake or f'valid for {_name(script)}'}",
            file=sys.stderr if mistake else sys.stdout,
            flush=True,
        )
    status = int(any(mistakes.values()))
    if left:
        folder = Path(__file__).resolve().parents[2]
        status |= subprocess.run([sys.executable, "-c", _WHOLE, str(folder), *map("=".join, left)]).returncode
    return status


def _judge(
    files: Iterable[tuple[str, ...]], *, with_torch: bool
) -> tuple[dict[tuple[str, ...], str], list[tuple[str, ...]]]:
    """Return the mistake in each file, or nothing, and which files need torch."""
    mistakes, left = {}, []
    for script, path in files:
        try:
            mistakes[script, path] = _find_mistake(script, path, with_torch=with_torch)
        except torchless.NeedsTorchError:
            left.append((script, path))
    return mistakes, left


def _find_mistake(script: str, path: str, *, with_torch: bool) -> str:
    """Return what the parser says of the file, without the path, or nothing.

    Raises:
        NeedsTorchError: It takes torch to say.
    """
    from recipes.support.config import HINT, parse_recipe_arguments

    if script.startswith("trl "):
        return _find_mistake_for_trl(script, path, with_torch=with_torch)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parser, demo_config = _parser(script, with_torch=with_torch)

            def parse() -> None:
                parse_recipe_arguments(parser, ["--config", path], demo_config=demo_config)

            parse() if with_torch else torchless.judge(parse, _keys(path))
    except SystemExit:
        # Libraries that are imported meanwhile may have said something before.
        message = re.split(r"(?m)^error: ", errors.getvalue())[-1]
        return message.strip().removesuffix(HINT).strip().removeprefix(f"{path}: ")
    return ""


def _find_mistake_for_trl(command: str, path: str, *, with_torch: bool) -> str:
    if not with_torch:
        raise torchless.NeedsTorchError
    from recipes.support import trl_commands

    return trl_commands.find_mistake(command.removeprefix("trl "), path)


def _name(script: str) -> str:
    return script if script.startswith("trl ") else f"{script}.py"


@functools.cache
def _parser(script: str, *, with_torch: bool) -> tuple[Any, Path]:
    try:
        from recipes.support import parsers

        parser = getattr(parsers, script)()
        if not with_torch:
            torchless.watch(parser.dataclass_types)
    except ImportError as error:
        if with_torch:
            raise
        raise torchless.NeedsTorchError from error
    return parser, parsers.DEMO_CONFIGS[script]


def _keys(path: str) -> set[Any]:
    from recipes.support.config import content_of

    try:
        content = content_of(Path(path))
    except ValueError:  # which the parser says too
        return set()
    return set(content)


if __name__ == "__main__":
    sys.exit(main())
