"""One parser for a recipe: defaults, then a YAML file, then flags."""

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from recipes.support.config_names import find_config, with_config_flag
from recipes.support.other_names import nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# A run that names none of these is the demo.
_INPUT_FLAGS = ("config", "model_name_or_path", "dataset_name", "train_file", "train_folder")
HINT = "(--help lists every flag)"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
# What --help shows together, in this order: what the recipes have of their own comes first.
_GROUPS = ("model", "data", "adapter", "run", "trainer")
_OF_ADAPTERS = re.compile(r"full$|modules_to_save$|load_in_|bnb_|use_(?!cpu|cache|liger)|.*lora|adapter")
# Names that transformers changed within the supported range: the new one, which files use, and the one it had.
FORMER_NAMES = {"activation_checkpointing": "gradient_checkpointing"}


class RecipeParser(HfArgumentParser):
    """HfArgumentParser that answers a mistake with one line, not with the usage of 150 flags."""

    def __init__(self, dataclass_types: list[type], *, prog: str, description: str) -> None:
        """Build the parser of several dataclasses; abbreviated flags are not understood."""
        usage = f"{prog} [CONFIG] [--flag value ...]\n\nCONFIG is a YAML file, or a name of `hf-tam recipes list`."
        self._group_names = {
            field.name: _group_of(field.name, kind) for kind in dataclass_types for field in dataclasses.fields(kind)
        }
        self._groups: dict[str, Any] = {}
        super().__init__(dataclass_types, prog=prog, usage=usage, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the message alone and exit with argparse's status, 2."""
        self.exit(2, f"error: {message} {HINT}\n")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument to its group; a bare percent sign, as transformers 5.2 has, would break --help."""
        if "help" in options:
            options["help"] = re.sub(r"(?<!%)%(?![%(])", "%%", options["help"])
        group = self._group_names.get(options.get("dest") or names[0].lstrip("-"))
        if group is None:  # --help itself
            return super().add_argument(*names, **options)
        self._groups = self._groups or {title: self.add_argument_group(title) for title in _GROUPS}
        return self._groups[group].add_argument(*names, **options)

    @property
    def field_names(self) -> list[str]:
        """Every argument that a flag or a YAML file may set."""
        fields = [field for dataclass in self.dataclass_types for field in dataclasses.fields(dataclass)]
        return [field.name for field in fields if field.init]


def _group_of(name: str, kind: type) -> str:
    """Return where --help shows an argument of a dataclass."""
    if issubclass(kind, TrainingArguments) or kind.__name__ == "LoopArguments":
        return "trainer"
    if _OF_ADAPTERS.match(name):
        return "adapter"
    groups = {"model": "Model", "data": "Data|Script"}
    return next((group for group, word in groups.items() if re.search(word, kind.__name__)), "run")


def precision_of_the_launch() -> dict[str, bool]:
    """Return `bf16` and `fp16` as `accelerate launch` was told, where DeepSpeed wants both to say the same."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return {}
    return {name: os.environ.get("ACCELERATE_MIXED_PRECISION") == name for name in ("bf16", "fp16")}


def parse_recipe_arguments(parser: RecipeParser, argv: list[str], *, demo_config: Path | None) -> tuple[Any, ...]:
    """Parse `argv` over the YAML file it names; with no model, data or file named, over the demo's.

    The file is turned into flags that stand before the user's own, so both are checked by the same parser and the
    later one wins.

    Returns:
        One instance of each dataclass of the parser, in its order.
    """
    argv = with_config_flag(argv)
    named = _named_inputs(argv)
    config = named.pop("config") or (None if any(named.values()) else demo_config)
    try:
        file_flags = flags_from_yaml(find_config(str(config)), known=parser.field_names) if config else []
        *arguments, unknown = parser.parse_args_into_dataclasses(
            [*_with_strategies(file_flags), *_with_strategies(argv)],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
        _refuse_phases([*file_flags, *argv])
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(_describe_unknown(unknown[0].split("=")[0], parser.field_names))
    return tuple(arguments)


def content_of(path: Path) -> dict[Any, Any]:
    """Read a YAML mapping.

    Raises:
        ValueError: the file is missing, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of arguments, not {type(content).__name__}")
    return content


def flags_from_yaml(path: Path, *, known: list[str]) -> list[str]:
    """Read a YAML mapping as command-line flags.

    Raises:
        ValueError: the file is missing, is no flat mapping, or has a key that no flag has.
    """
    content = content_of(path)
    flags = []
    for key, value in content.items():
        key = key if key in known else FORMER_NAMES.get(key, key)
        if key not in known or key == "config":
            raise ValueError(f"{path}: unknown key '{key}'{nearest(str(key), known)}")
        flags += _as_flags(key, value)
    return flags


def _with_strategies(flags: list[str]) -> list[str]:
    """`flags`, where `save_steps` or `eval_steps` also asks for that strategy: alone they would have no effect."""
    names = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    implied = [
        f"--{event}_strategy=steps"
        for event in ("save", "eval")
        if f"{event}_steps" in names and f"{event}_strategy" not in names
    ]
    return [*implied, *flags]


def _refuse_phases(flags: list[str]) -> None:
    """Refuse what would leave out, or add, a part of the run: the recipes train, and then measure on what is named.

    Raises:
        ValueError: naming the flag.
    """
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in _PHASES:
        scanner.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true")
    for name, value in vars(scanner.parse_known_args(flags)[0]).items():
        unavailable, remedy = _PHASES[name]
        if value is not None and (value.lower() in ("true", "1", "yes", "y", "t")) == unavailable:
            raise ValueError(f"{name} = {value}: {remedy}")


_PHASES = {
    "do_train": (False, "this recipe always trains; a saved model is used by transformers' pipeline."),
    "do_eval": (False, "what is measured are the validation and test data that are named: name none, or"
                       " --eval_strategy no for none during training."),
    "do_predict": (True, "this recipe writes no predictions; transformers' pipeline gives those of a saved model."),
}  # fmt: skip


def _named_inputs(argv: list[str]) -> dict[str, str | None]:
    """Which of the inputs `argv` names, whatever else it holds."""
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in _INPUT_FLAGS:
        scanner.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    return vars(scanner.parse_known_args(argv)[0])


def _describe_unknown(word: str, known: list[str]) -> str:
    if not word.startswith("-"):
        return f"unexpected value '{word}': an argument before it takes a single value"
    return f"unknown argument {word}{nearest(word.lstrip('-').replace('-', '_'), known, prefix='--')}"


def _as_flags(key: str, value: Any) -> list[str]:
    """One YAML entry as flags; null leaves the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML reads as false
    return [f"--{key}={json.dumps(_numbers(value)) if isinstance(value, dict | bool) else value}"]


def _numbers(value: Any) -> Any:
    """A mapping with numbers for what YAML 1.1 reads as text, as it does with 1e-6."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
