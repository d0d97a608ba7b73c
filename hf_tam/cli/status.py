"""`hf-tam status`: versions, what is registered and patched, and whether this environment is activated."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_tam.cli.activate import hook_path
from hf_tam.integrations import autoload

PACKAGES = ("hf-tam", "torch", "transformers", "accelerate", "peft", "trl", "deepspeed")


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("status", help="versions, what is registered, and whether this is activated")
    parser.set_defaults(command=status)


def status(parsed: argparse.Namespace) -> int:
    """Print the state of this environment; imports transformers to see what a script would get.

    Returns:
        1 if the names cannot be registered with the transformers that is installed, else 0.
    """
    print(f"python {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package} {_version_of(package)}")
    print(f"activated: {_activation()}")
    print(f"below hf-tam run: {_yes_no(autoload.SITE_FOLDER in os.environ.get('PYTHONPATH', '').split(os.pathsep))}")
    return _print_registration()


def _print_registration() -> int:
    if _version_of("transformers") == "not installed":
        print("registered: nothing, transformers is not installed")
        return 1
    try:
        autoload.install()
        for module in autoload.PATCHED_MODULES:
            if _version_of(module.split(".")[0]) != "not installed":
                importlib.import_module(module)
    except ImportError as error:
        print(f"registered: nothing. {error}")
        return 1
    from hf_tam.integrations import accelerate
    from hf_tam.integrations import transformers as integration

    names = [f"--optim {name} ({integration.OPTIMIZERS[name]})" for name in integration.registered_names]
    print(f"tested with transformers{integration.TESTED_RANGE}")
    print(f"registered: {', '.join(names) or 'nothing'}")
    print(f"patched: {', '.join([*integration.patched, *accelerate.patched])}")
    return 0


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _activation() -> str:
    if not hook_path().is_file():
        return "no"
    switched_off = f", but switched off here by {autoload.KILL_SWITCH}=0" if autoload.is_switched_off() else ""
    return f"yes, by {hook_path()}{switched_off}"


def _yes_no(condition: bool) -> str:
    return "yes" if condition else "no"
