"""Imports go one way, and private names of other libraries stay in `hf_tam.integrations`."""

import ast
from pathlib import Path

import pytest

import hf_tam

PACKAGE = Path(hf_tam.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each layer may import of the package, besides itself.
ALLOWED = {
    "update": set(),
    "hyperparameters": set(),
    "ownership": set(),
    "_version": set(),
    "family": {"update"},
    "backends": {"update"},
    "sharding": {"update", "ownership"},
    "logical": {"ownership", "sharding"},
    "step": {"update", "family", "backends", "sharding"},
    "saved_groups": {"hyperparameters", "torque_aware", "step"},
    "checkpoint": {"update", "sharding", "torque_aware", "step", "saved_groups"},
    "torque_aware": {"family", "sharding", "step", "checkpoint", "hyperparameters", "logical"},
    "optim": {"update", "family", "hyperparameters", "torque_aware"},
    "torque_log": {"torque_aware"},
    "report": set(),
    "bench": {"optim", "_version"},
    "compare": set(),
}  # fmt: skip
FRAMEWORKS = {"transformers", "accelerate", "peft", "trl", "deepspeed", "datasets", "evaluate"}


def layer(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Full names of everything a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [path for path in FILES if layer(path) in ALLOWED], ids=str)
def test_imports_go_one_way(path):
    own = [name.split(".")[1] for name in imported_modules(path) if name.startswith("hf_tam.")]
    assert set(own) - {layer(path)} <= ALLOWED[layer(path)]


def test_every_layer_is_known():
    assert {layer(path) for path in FILES} == {*ALLOWED, "__init__", "__main__", "cli", "integrations"}


@pytest.mark.parametrize("path", [path for path in FILES if layer(path) in ALLOWED], ids=str)
def test_frameworks_are_imported_by_integrations_only(path):
    assert not {name.split(".")[0] for name in imported_modules(path)} & FRAMEWORKS


def test_recipes_are_not_imported_by_the_package():
    assert not [path for path in FILES for name in imported_modules(path) if name.split(".")[0] == "recipes"]
