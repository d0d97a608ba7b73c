"""Imports go one way and never in a circle, and private names stay at home: computed from the source."""

import ast
import re
from pathlib import Path

import pytest

import hf_tam

PACKAGE = Path(hf_tam.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the package, besides itself and what `LEAVES` names.
ALLOWED = {
    "precision": set(),
    "update": {"precision"},
    "hyperparameters": set(),
    "_version": set(),
    "backends": {"update", "precision"},
    "sharding": {"update", "hyperparameters"},
    "family": {"update", "sharding"},
    "step": {"update", "hyperparameters", "family", "backends", "sharding"},
    "saved_groups": {"family", "hyperparameters", "step"},
    "checkpoint": {"update", "hyperparameters", "family", "sharding", "step", "saved_groups"},
    "export": {"update", "hyperparameters", "family", "checkpoint"},
    "torque_aware": {"family", "sharding", "step", "checkpoint", "hyperparameters"},
    "optim": {"update", "family", "hyperparameters", "torque_aware"},
    "torque_log": {"integrations"},  # to look inside what wraps an optimizer
    "lab": {"optim", "_version"},
}
# What other libraries keep private, read for the rooms above; these import none of them.
LEAVES = {
    "hf_tam.integrations.torch_private",
    "hf_tam.integrations.marks",
    "hf_tam.integrations.deepspeed.partitions",
    "hf_tam.integrations.transformers.tensor_parallel",
}
FRAMEWORKS = {"transformers", "accelerate", "peft", "trl", "deepspeed", "datasets", "evaluate"}

# torch.optim's own means: without an underscore there is nothing like them (torch 2.13, optim/adam.py).
TORCH_OPTIM = re.compile(r"_foreach_\w+|_fused_(adamw|sgd)_")
# Of the standard library, and of a tensor (whether it goes on writing to the same memory is what a benchmark asks).
STANDARD = {"_fields", "_replace", "_asdict", "_exit", "_cdata", "_bytes"}


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported_names(name):
    """Full names of everything a module imports: at the top, inside a function, or for the type checker alone."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name):
    """The modules of the package among them."""
    for imported in imported_names(name):
        while imported and imported not in MODULES:
            imported = imported.rpartition(".")[0]
        if imported not in ("", name):
            yield imported


IN_ROOMS = pytest.mark.parametrize("name", [name for name, path in MODULES.items() if room(path) in ALLOWED])


@IN_ROOMS
def test_imports_go_one_way(name):
    own = room(MODULES[name])
    others = [other for other in imported_modules(name) if other not in LEAVES and other != "hf_tam"]
    assert {other.split(".")[1] for other in others} - {own} <= ALLOWED[own]


def test_leaves_import_leaves_only():
    assert {other for leaf in LEAVES for other in imported_modules(leaf)} <= LEAVES


def test_every_room_is_known():
    assert {room(path) for path in FILES} == {*ALLOWED, "__init__", "__main__", "cli", "integrations"}


def test_no_module_imports_itself_by_way_of_others():
    imports = {name: set(imported_modules(name)) for name in MODULES}

    def reachable(start):
        found, left = set(), list(imports[start])
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += imports[name]
        return found

    assert not [name for name in MODULES if name in reachable(name)]


@IN_ROOMS
def test_frameworks_are_imported_by_integrations_only(name):
    assert not {imported.split(".")[0] for imported in imported_names(name)} & FRAMEWORKS


def test_recipes_are_not_imported_by_the_package():
    assert not [name for name in MODULES for other in imported_names(name) if other.split(".")[0] == "recipes"]


# --- private names --------------------------------------------------------------------------------------------------


def is_private(name):
    return name.startswith("_") and name.isidentifier() and not name.startswith("__") and name != "_"


def defined_in(tree):
    """Names that a module gives to something: functions, classes, variables, fields and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def foreign_private_names(name):
    """Private names that a module uses and does not define: attributes, imports, strings for getattr and its kin."""
    own = set(defined_in(TREES[name]))
    for node in ast.walk(TREES[name]):
        used = []
        if isinstance(node, ast.Attribute):
            used = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr", "map", "repeat", "attrgetter"):
                used = [each.value for each in node.args if isinstance(each, ast.Constant)]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("hf_tam."):
            used = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            used = [alias.name for alias in node.names]
        for each in used:
            if isinstance(each, str) and is_private(each) and each not in own | STANDARD:
                yield each


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if room(path) != "integrations"])
def test_private_names_of_others_are_used_in_integrations_only(name):
    """Those of other libraries, and of other modules here."""
    assert not [used for used in foreign_private_names(name) if not TORCH_OPTIM.fullmatch(used)]


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_is_imported_from_another_module_of_ours(name):
    own = [full for full in imported_names(name) if full.startswith("hf_tam.")]
    assert not [full for full in own if is_private(full.split(".")[-1]) and full not in MODULES]


def test_the_private_names_are_found():
    """The tests above see what they look for."""
    assert "_hp_mapping" in foreign_private_names("hf_tam.integrations.deepspeed.partitions")
    assert "_handle" in foreign_private_names("hf_tam.integrations.torch_private")
    assert "_fused_adamw_" in foreign_private_names("hf_tam.backends.torch_fused")


# --- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_file_has_at_most_400_lines(name):
    assert len(MODULES[name].read_text().splitlines()) <= 400


def test_the_step_is_told_in_one_function_of_less_than_40_lines():
    (story,) = (node for node in ast.walk(TREES["hf_tam.step.pipeline"]) if getattr(node, "name", "") == "_take")
    assert ast.get_docstring(story)
    assert story.end_lineno - story.lineno + 1 < 40
