"""What users write, and what files hold, is what stands in frozen.py."""

import argparse
import dataclasses
import inspect
import json
import pprint

import pytest
import torch
from trl import ModelConfig, ScriptArguments

import hf_tam
from hf_tam import cli
from hf_tam.integrations.transformers.optim_args import KEYS
from hf_tam.lab.compare import running
from hf_tam.lab.compare.plan import Spec
from recipes.support import arguments, reporting, task_arguments
from tests.frozen import FROZEN

ADVICE = (
    "What is public has changed. If that is meant, write it into tests/frozen.py (`python -m tests.test_frozen` "
    "prints the table as it is now) and say it in CHANGELOG.md; what was taken away, or has another default now, "
    "breaks somebody's script or configuration."
)


def public(folder):
    """What is there now, in the form of frozen.py; `folder` takes a file."""
    spec = Spec("sft", "ours", {"learning_rate": 1e-3, "seed": 1})
    return {
        "hf_tam": sorted(hf_tam.__all__),
        "constructors": {name: constructor(getattr(hf_tam, name)) for name in ("AdaTAMW", "AdaTAM", "TAM")},
        "optim_args": {name: sorted(keys) for name, keys in KEYS.items()},
        "commands": dict(sorted(commands(cli.make_parser(), "hf-tam").items())),
        "recipes": {kind.__name__: sorted(fields(kind)) for kind in own_arguments()},
        "results.json": results_keys(folder / "results.json"),
        "rows.jsonl": list(running._row(spec, {}, seconds=1.0, recipe="sft.py")),
    }


def constructor(kind):
    """Each parameter with its default, in order; a * before those that are keywords only."""
    found = []
    for name, parameter in list(inspect.signature(kind).parameters.items()):
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(f"{star}{name}{default}")
    return found


def commands(parser, name):
    """The words and flags of each command that ends a chain of subcommands."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if below:
        found = {}
        for word, child in below[0].choices.items():
            found |= commands(child, f"{name} {word}")
        return found
    words = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            words += action.option_strings or [f"{action.metavar or action.dest}{action.nargs or ''}"]
    return {name: sorted(map(str, words))}


def fields(kind):
    """What a class of ours adds to TRL's."""
    theirs = {name for base in (ModelConfig, ScriptArguments) for name in base.__dataclass_fields__}
    return [field.name for field in dataclasses.fields(kind) if field.init and field.name not in theirs]


def own_arguments():
    for module in (arguments, task_arguments):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                yield kind


def differences(found, frozen, where=""):
    """What is there and not in the table, and the other way round, one line each."""
    if isinstance(found, dict) and isinstance(frozen, dict):
        for key in [*frozen, *(key for key in found if key not in frozen)]:
            yield from differences(found.get(key, []), frozen.get(key, []), f"{where}.{key}".lstrip("."))
        return
    if found == frozen:
        return
    gone, new = [item for item in frozen if item not in found], [item for item in found if item not in frozen]
    yield f"{where}: gone {gone}, new {new}" if gone or new else f"{where}: the order is now {found}"


def results_keys(path):
    """What every recipe writes, beside its metrics; with the keys that are one level below."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = hf_tam.AdaTAMW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    facts = reporting.describe_run(optimizer, (1, 2), strategy="", num_records=1, num_steps=1, seconds=1.0)
    reporting.write_results(path, facts, (arguments.RunArguments(),))
    content = json.loads(path.read_text())
    return [*content, *(f"environment.{name}" for name in content["environment"])]


@pytest.mark.long
def test_what_is_public_is_what_is_frozen(tmp_path):
    told = list(differences(public(tmp_path), FROZEN))
    assert not told, "\n".join([ADVICE, *told])


if __name__ == "__main__":
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        pprint.pprint(public(pathlib.Path(scratch)), width=119, sort_dicts=False)
