"""Check a configuration for one of TRL's own commands, as `trl COMMAND --config FILE` would read it."""

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support.config import content_of
from recipes.support.other_names import nearest


def find_mistake(command: str, path: str) -> str:
    """Return what TRL's parser says of the file, in one line, or nothing.

    Args:
        command: What follows `trl`.
        path: A YAML file.
    """
    try:
        parser = importlib.import_module(f"trl.scripts.{command}").make_parser(prog=f"trl {command}")
    except ModuleNotFoundError as error:
        return f"'trl {command}' is no command: {error}"
    errors = io.StringIO()
    try:
        # TRL hands what it does not know to `accelerate launch`.
        known = _fields(parser) | _launch_options()
        for key in content_of(Path(path)):
            if key not in known:
                return f"unknown key '{key}'{nearest(str(key), sorted(known))}"
        with contextlib.redirect_stderr(errors):
            # On the CPU, because the machine that trains may be another one.
            parser.parse_args_and_config(["--config", path, "--use_cpu", "true"], return_remaining_strings=True)
    except SystemExit:  # after the usage of 200 flags
        return errors.getvalue().rpartition("error: ")[2].strip()
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split()).removeprefix(f"{path} ")
    return ""


def _fields(parser: Any) -> set[str]:
    return {name for kind in parser.dataclass_types for name in kind.__dataclass_fields__}


def _launch_options() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {"env", "accelerate_config", *vars(launch_command_parser().parse_args(["script.py"]))}
