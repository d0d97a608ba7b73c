"""Reads configurations by the recipes' own parsers in a process that keeps torch out: in one second, not in seven.

transformers' training arguments do not need torch but for what they ask of the machine. Where a file asks for such a
thing (bf16, FSDP, torch.compile, a backend of the network, ...), or the process was launched as one of several, it is
said that torch is needed, and the whole stack has to be asked.
"""

import os
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

_LAUNCHED = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|(ACCELERATE|FSDP|DEEPSPEED|SM)_\w+")
# What of training arguments has another type without accelerate, or is handed on to it as it is.
_OF_ACCELERATE = ("accelerator_config", "parallelism_config", "deepspeed", "fsdp", "fsdp_config")


class NeedsTorchError(Exception):
    """What a file says can only be judged with torch."""


def hide_torch() -> None:
    """Make torch and accelerate modules that are not installed, in this process and from now on.

    Raises:
        NeedsTorchError: torch or transformers is there already, or the process was launched as one of several.
    """
    if {"torch", "transformers"} & set(sys.modules) or any(_LAUNCHED.fullmatch(name) for name in os.environ):
        raise NeedsTorchError
    sys.modules.update(dict.fromkeys(("torch", "accelerate")))  # type: ignore[arg-type]


def watch(dataclasses: list[type]) -> None:
    """Have training arguments raise NeedsTorchError where they would ask torch or the device something.

    Args:
        dataclasses: Of a parser.
    """
    from transformers import TrainingArguments, training_args

    if not any(issubclass(kind, TrainingArguments) for kind in dataclasses) or "NeedsTorchError" in vars(
        training_args
    ):
        return
    module = vars(training_args)
    for name in list(module):
        if re.fullmatch(r"is_torch_\w+_available", name):
            module[name] = _need_torch
    # torch is installed, as the whole stack would find; what then uses it meets a name that is not there.
    module.update(
        is_torch_available=lambda: True,
        is_accelerate_available=lambda *_: True,
        # Whether this machine's GPU has bfloat16 is no question of the file.
        is_torch_bf16_gpu_available=lambda: True,
        AcceleratorConfig=_DefaultAcceleratorConfig,
        NeedsTorchError=NeedsTorchError,
    )
    asked = _fields_read(TrainingArguments) - {"use_cpu", *_OF_ACCELERATE}
    TrainingArguments.device = property(lambda self: _device(self, asked))


class _DefaultAcceleratorConfig:
    """Stands for accelerate's while nothing is said of it."""

    split_batches = False

    def __init__(self, **options: Any) -> None:
        if options:
            raise NeedsTorchError

    @classmethod
    def from_json_file(cls, path: str) -> NoReturn:
        raise NeedsTorchError


def judge(parse: Callable[[], Any], named: set[str]) -> None:
    """Run a parser, and tell what it can say without torch from what it cannot.

    Args:
        parse: Parses one configuration.
        named: Keys of the configuration.

    Raises:
        NeedsTorchError: It cannot say whether the configuration is right.
        SystemExit: It is wrong; what was said is on stderr.
    """
    if named & set(_OF_ACCELERATE):
        raise NeedsTorchError
    try:
        parse()
    except (ImportError, NameError, AttributeError, TypeError) as error:  # what torch or accelerate would have been
        raise NeedsTorchError from error


def _need_torch(*_: object, **__: object) -> NoReturn:
    raise NeedsTorchError


def _fields_read(arguments: Any) -> set[str]:
    """Return the fields that training arguments read where they set up the device, as this version has it."""
    setup = arguments.__dict__["_setup_devices"]
    code = getattr(setup, "func", getattr(setup, "fget", None)).__code__
    return {name for name in code.co_names if name in arguments.__dataclass_fields__}


def _device(arguments: Any, names: set[str]) -> Any:
    """Stand for the device: without torch a file is judged as for a GPU, unless it names the CPU."""
    fields = arguments.__dataclass_fields__
    if any(getattr(arguments, name) not in (fields[name].default, None) for name in names):
        raise NeedsTorchError
    return SimpleNamespace(type="cpu" if arguments.use_cpu else "cuda")
