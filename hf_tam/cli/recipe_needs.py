"""What a copy of a script needs to run: the modules that it imports, and the files that these read."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_tam.cli.recipe_files import RecipeFile, recipe_of

# Folders whose files a module finds by their place. Configurations are found by name, in the installed package.
_READ = ("metrics", "templates")


def files_to_run(script: RecipeFile, folder: Path) -> list[Path]:
    """Return what a copy of `script` needs, relative to `folder`, which holds the package `recipes`."""
    modules = _modules(script.path, folder)
    read = {name for tree in modules.values() for name in _joined(tree)}
    files = [*modules, *_demo(script, folder)]
    for name in _READ:
        if name in read:
            files += (path for path in (folder / "recipes" / name).iterdir() if path.is_file())
    return sorted(path.relative_to(folder) for path in files)


def _modules(path: Path, folder: Path) -> dict[Path, ast.Module]:
    """Return a file and all of the package that it imports, at its top, inside functions and by way of others."""
    found: dict[Path, ast.Module] = {}
    left = [path]
    while left:
        if (file := left.pop()) not in found:
            found[file] = ast.parse(file.read_text(encoding="utf-8"))
            left += _files(_imported(found[file]), folder)
    return found


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the names of everything that may be a module of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _joined(tree: ast.Module) -> Iterator[str]:
    """Yield what is put at the end of a path by a slash: the word alone may be anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            yield str(node.right.value)


def _files(names: Iterable[str], folder: Path) -> Iterator[Path]:
    """Yield the files of those names that are modules of the package, and those of the packages around them."""
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1) if parts[0] == "recipes" else ():
            place = folder.joinpath(*parts[:length])
            yield from (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())


def _demo(script: RecipeFile, folder: Path) -> Iterator[Path]:
    for path in (folder / "recipes" / "configs" / "demo").glob("*.yaml"):
        if recipe_of(path.read_text(encoding="utf-8")) == script.path.name:
            yield path
