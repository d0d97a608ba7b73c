"""`hf-tam status`: versions, what is registered and patched, the backend and the strategies this environment has."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_tam.cli.activate import hook_path
from hf_tam.integrations import autoload
from hf_tam.integrations.deepspeed.patches import ACCEPTED_RANGE as DEEPSPEED_RANGE
from hf_tam.integrations.switches import KILL_SWITCH

# What torchrun and accelerate launch leave behind.
LAUNCH_VARIABLES = (
    "WORLD_SIZE", "RANK", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_TP_SIZE",
)  # fmt: skip
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths need not be text in this locale, or at all
    print(f"python {platform.python_version()}")
    for package in PACKAGES:
        print(f"{package} {_version_of(package)}")
    print(f"activated: {_activation()}")
    print(f"below hf-tam run: {_yes_no(autoload.SITE_FOLDER in os.environ.get('PYTHONPATH', '').split(os.pathsep))}")
    print(f"backend: {_backend()}")
    for strategy, state in _strategies().items():
        print(f"strategy {strategy}: {state}")
    print(f"launched with: {_launch()}")
    return _print_registration()


def _backend() -> str:
    """What would execute a step on the device that a Trainer would choose here."""
    import torch

    from hf_tam.backends import select_backend
    from hf_tam.backends.native import library

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backend = select_backend(device, foreach=None, fused=None, on_host=device.type == "cpu")
    name: str = backend.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    notes = [f"device: {device.type}"]
    if device.type == "cpu":
        reasons = {"not native": library.why_not(), "compiled for this process only": library.why_not_kept()}
        notes += [f"{what}: {reason}" for what, reason in reasons.items() if reason]
    return f"{name} ({'; '.join(notes)})"


def _strategies() -> dict[str, str]:
    """Each way of sharding: whether it can be used here, and what it takes."""
    import torch

    distributed = torch.distributed.is_available()
    backends = [name for name in ("nccl", "gloo", "xccl") if distributed and _has_backend(name)]
    ready = f"available ({', '.join(backends)})" if backends else "not available in this build of torch"
    deepspeed = _version_of("deepspeed")
    installed = deepspeed != "not installed"
    return {
        "DDP": f"{ready}; nothing is communicated",
        "FSDP2, HSDP, tensor parallelism": ready,
        "FSDP1": f"{ready}; use_orig_params=True",
        "DeepSpeed ZeRO": f"available ({deepspeed}; made for {DEEPSPEED_RANGE})" if installed else "not installed",
    }


def _has_backend(name: str) -> bool:
    import torch

    return bool(torch.distributed.is_backend_available(name))


def _launch() -> str:
    """What a launcher has put into the environment of this process."""
    found = [f"{name}={os.environ[name]}" for name in LAUNCH_VARIABLES if name in os.environ]
    return ", ".join(found) or "nothing (one process)"


def _print_registration() -> int:
    if _version_of("transformers") == "not installed":
        print("registered: nothing, transformers is not installed")
        return 1
    try:
        autoload.install()
        for module in autoload.PATCHED_MODULES:
            # importing deepspeed takes seconds, and fails in its own ways where no device or compiler is found
            if not module.startswith("deepspeed.") and _version_of(module.split(".")[0]) != "not installed":
                importlib.import_module(module)
    except ImportError as error:
        print(f"registered: nothing. {error}")
        return 1
    from hf_tam.integrations.accelerate import patches as accelerate
    from hf_tam.integrations.transformers import patches as integration
    from hf_tam.integrations.transformers.optimizer_names import OPTIMIZERS

    names = [f"--optim {name} ({OPTIMIZERS[name]})" for name in integration.registered_names]
    print(f"made for transformers{integration.ACCEPTED_RANGE} (what was run: docs/support.md)")
    print(f"registered: {', '.join(names) or 'nothing'}")
    print(f"patched: {', '.join(dict.fromkeys([*integration.patched, *accelerate.patched]))}")
    return 0


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _activation() -> str:
    if not hook_path().is_file():
        return "no"
    switched_off = f", but switched off here by {KILL_SWITCH}=0" if autoload.is_switched_off() else ""
    return f"yes, by {hook_path()}{switched_off}"


def _yes_no(condition: bool) -> str:
    return "yes" if condition else "no"
