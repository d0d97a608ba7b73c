"""Reads `--optim_args`: strict, typed, and checked before a model is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from hf_tam.hyperparameters import HYPERPARAMETERS

OptimArg = bool | int | float | str | None


def _boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _optional(read: Callable[[str], bool | int | str]) -> Callable[[str], OptimArg]:
    return lambda text: None if text.lower() == "none" else read(text)


# For each kind of `hf_tam.hyperparameters.Hyperparameter` how a text is read, and what an error calls it. Ranges and
# words are the optimizer's to check.
_READERS: dict[str, tuple[Callable[[str], OptimArg], str]] = {
    "number": (float, "a number"),
    "word": (str, "a word"),
    "flag": (_boolean, "true or false"),
    "optional flag": (_optional(_boolean), "true, false or none"),
    "optional word": (_optional(str), "a word or none"),
    "optional integer": (_optional(int), "a whole number or none"),
}
_FOR_THE_TRAINER = ("log_torque", "fused_clip")  # and not for the constructor
_SPELT_OUT = {"betas": ("beta1", "beta2")}


def _keys(rule: str) -> dict[str, tuple[Callable[[str], OptimArg], str]]:
    """One entry a key that `optim_args` may have for the optimizers of this rule."""
    keys = {}
    for name, known in HYPERPARAMETERS.items():
        if known.rule in (None, rule):
            if known.kind is not None:
                keys[name] = _READERS[known.kind]
            keys.update(dict.fromkeys(_SPELT_OUT.get(name, ()), _READERS["number"]))
    return keys | dict.fromkeys(_FOR_THE_TRAINER, _READERS["flag"])


KEYS = {"adatamw": _keys("adam"), "adatam": _keys("adam"), "tam": _keys("sgd")}

# What the Trainer has an argument of its own for, or what torch calls by another name.
_ELSEWHERE = {
    "lr": "use --learning_rate",
    "learning_rate": "use --learning_rate",
    "weight_decay": "use --weight_decay",
    "max_grad_norm": "use --max_grad_norm, and fused_clip=true to clip inside the step",
    "betas": "use beta1=... and beta2=...",
}


def parse_optim_args(optim: str, text: str | None) -> dict[str, OptimArg]:
    """Read the `optim_args` of one of our optimizers.

    Args:
        optim: "adatamw", "adatam" or "tam".
        text: As the user wrote it: `key=value` pairs with commas between them, spaces and a trailing comma allowed.

    Returns:
        The values by key, each of its key's type.

    Raises:
        ValueError: Naming the pair and what was expected, with the nearest key and the whole list for an unknown one.
        TypeError: If `text` is not a string.
    """
    if text is not None and not isinstance(text, str):
        raise TypeError(
            f"optim_args must be a string like 'gamma=0.95,scope=model', got {text!r} of type {type(text).__name__}"
        )
    values: dict[str, OptimArg] = {}
    # transformers' own parser fails on "a=1," and "gamma" with "not enough values to unpack", its optimizers pass over
    # keys that they do not know, and decouple_lr=False is True (5.23, trainer_optimizer.py).
    for pair in (text or "").split(","):
        if not pair.strip():
            continue
        key, separator, value = (part.strip() for part in pair.partition("="))
        _require_known(optim, key)
        if not separator or not value:
            raise ValueError(f"optim_args has {pair.strip()!r}: expected {key}=VALUE, {KEYS[optim][key][1]}")
        if key in values:
            raise ValueError(f"optim_args gives {key!r} twice: {values[key]!r} and {value!r}")
        values[key] = _read(optim, key, value)
    return values


def format_optim_args(values: Mapping[str, OptimArg]) -> str | None:
    """Write values so that the parser of transformers reads them too (it knows no spaces and no trailing comma)."""
    return ",".join(f"{key}={value}" for key, value in values.items()) or None


def _require_known(optim: str, key: str) -> None:
    known = KEYS[optim]
    if key in known:
        return
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = _ELSEWHERE.get(key) or (f"did you mean {nearest[0]!r}?" if nearest else "nothing is called like it")
    raise ValueError(f"optim_args has {key!r}, unknown to --optim {optim}: {hint} (the keys are {', '.join(known)})")


def _read(optim: str, key: str, value: str) -> OptimArg:
    read, expected = KEYS[optim][key]
    try:
        return read(value)
    except ValueError:
        raise ValueError(f"optim_args has {key}={value}: {key} must be {expected}, got {value!r}") from None
