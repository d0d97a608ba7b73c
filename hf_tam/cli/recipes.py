"""`hf-tam recipes`: list, show, copy and check the recipes, of an installed wheel as of a checkout."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_tam.cli import recipe_files
from hf_tam.cli.recipe_files import RecipeFile
from hf_tam.cli.recipe_needs import files_to_run

_TITLES = {
    "script": "Scripts (run them with python, or with accelerate launch)",
    "configuration": "Configurations by GB before activations (for --config of what their Launch line names)",
    "launch": "Launch files (for accelerate launch --config_file)",
    "cluster": "Jobs on several machines (for sbatch, and for sky launch)",
}
# What every recipe imports; without them its parser cannot be asked.
_NEEDED = ("transformers", "peft", "datasets", "yaml")
# Run by a Python of its own, because this package never imports the recipes.
_VALIDATE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from recipes.support.validate import main; sys.exit(main())"
)


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand and its own."""
    parser = subparsers.add_parser("recipes", help="list, show, copy and check the fine-tuning recipes")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("list", help="scripts, configurations and launch files, with their purposes")
    action.add_argument("words", nargs="*", metavar="WORD", help="only those whose names have one of these in them")
    action.set_defaults(command=list_recipes)
    action = actions.add_parser("show", help="print a file")
    action.add_argument("name", metavar="NAME", help="as `list` prints it: sft.py, llama3.2-1b/lora, accelerate/ddp")
    action.set_defaults(command=show)
    action = actions.add_parser(
        "copy", help="write a script with all it needs to run, a configuration or a launch file"
    )
    action.add_argument("name", metavar="NAME", help="as `list` prints it")
    action.add_argument("target", metavar="TARGET", nargs="?", default=".", help="folder, or file; default: here")
    action.add_argument("--force", action="store_true", help="replace files that are there and differ")
    action.set_defaults(command=copy)
    action = actions.add_parser("validate", help="check configurations against the arguments of their recipe")
    action.add_argument("files", metavar="FILE", nargs="+")
    action.add_argument(
        "--recipe", metavar="SCRIPT", help="the recipe; default: that of the header's Launch, or sft.py"
    )
    action.set_defaults(command=validate)


def list_recipes(parsed: argparse.Namespace) -> int:
    """Print the names of all files and what each is for.

    Returns:
        1 if nothing has any of the words in its name, or there are no recipes, else 0.
    """
    try:
        files = recipe_files.list_files(recipe_files.find_folder())
    except OSError as error:
        return _complain(str(error))
    words = parsed.words
    files = [file for file in files if not words or any(word in file.place for word in words)]
    if not files:
        return _complain(f"no recipe has {' or '.join(words)} in its name; without words all are listed")
    width = max(len(file.name) for file in files)
    for kind, title in _TITLES.items():
        found = [file for file in files if file.kind == kind]
        if kind == "configuration":
            found.sort(key=lambda file: float(file.gigabytes or 0))
        lines = [_line(file, width) for file in found]
        if lines:
            _write("\n".join([title, *lines, "", ""]))
    return 0


def show(parsed: argparse.Namespace) -> int:
    """Print a file as it is.

    Returns:
        1 if there is none of that name, else 0.
    """
    try:
        file = _find(parsed.name)
    except (LookupError, OSError) as error:
        return _complain(_message(error))
    _write(file.path.read_text(encoding="utf-8"))
    return 0


def copy(parsed: argparse.Namespace) -> int:
    """Write a file, and for a script the package around it.

    Files that are there with the same content are left alone; if one differs nothing is written, unless forced.

    Returns:
        1 if there is none of that name, something would be overwritten or cannot be written, else 0.
    """
    try:
        file = _find(parsed.name)
        copies = _plan_copies(file, Path(parsed.target))
        differing = [target for source, target in copies.items() if _differs(source, target)]
        if differing and not parsed.force:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            return _complain(f"{differing[0]}{more} exists and differs: --force replaces it")
        for source, target in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except (LookupError, OSError) as error:
        return _complain(_message(error))
    _say_what_to_run(file, copies[file.path], num_files=len(copies))
    return 0


def validate(parsed: argparse.Namespace) -> int:
    """Have each recipe's own parser read the files that are for it, all in one process.

    Returns:
        1 if a file is wrong or cannot be read, else 0.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        return _complain(f"the recipes need {', '.join(missing)}: pip install 'hf-tam[recipes]'")
    try:
        folder = recipe_files.find_folder()
        scripts = _with_recipes(parsed.files, parsed.recipe, recipe_files.list_files(folder))
    except (LookupError, OSError, UnicodeDecodeError) as error:
        return _complain(_message(error))
    # Messages of libraries about the machine would stand between the results.
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    words = [f"{script}={path}" for script, path in scripts]
    return int(subprocess.run([sys.executable, "-c", _VALIDATE, str(folder), *words], env=environment).returncode != 0)


def _line(file: RecipeFile, width: int) -> str:
    size = f"{file.gigabytes:>5} {'GB' if file.gigabytes else '  '}  " if file.kind == "configuration" else ""
    return f"  {file.name:{width}}  {size}{file.purpose}"


def _find(name: str) -> RecipeFile:
    return recipe_files.find_file(name, recipe_files.list_files(recipe_files.find_folder()))


def _plan_copies(file: RecipeFile, target: Path) -> dict[Path, Path]:
    """Map what is copied to where."""
    if file.kind == "script":
        folder = recipe_files.find_folder()
        if target.is_file():
            raise NotADirectoryError(f"{target} is a file: a script needs a folder, for the package it runs in")
        return {folder / inside: target / inside for inside in files_to_run(file, folder)}
    # Many configurations are called lora.yaml: the copy says of what.
    name = f"{file.path.parent.name}-{file.path.name}" if file.kind == "configuration" else file.path.name
    is_file = target.suffix == file.path.suffix and not target.is_dir()
    return {file.path: target if is_file else target / name}


def _differs(source: Path, target: Path) -> bool:
    return target.exists() and (target.is_dir() or target.read_bytes() != source.read_bytes())


def _say_what_to_run(file: RecipeFile, target: Path, *, num_files: int) -> None:
    if file.kind == "script":
        needed = f" and {num_files - 1} files that it needs" if num_files > 1 else ""
        print(f"wrote {target}{needed}; run it with: python {target}")
    elif file.kind == "cluster":
        print(f"wrote {target}; its header says how to launch it")
    elif file.kind == "launch":
        option = "--deepspeed_config_file" if target.suffix == ".json" else "--config_file"
        print(f"wrote {target}; use it with: accelerate launch {option} {target} ...")
    else:
        launch = recipe_files.read_header(file.path.read_text(encoding="utf-8"))["Launch"]
        place = f"recipes/{file.place}"
        command = launch.replace(place, str(target)) if place in launch else f"{launch} --config {target}"
        print(f"wrote {target}; use it with: {command}")


def _with_recipes(paths: list[str], recipe: str | None, files: list[RecipeFile]) -> list[tuple[str, str]]:
    """Put before each path the module of its script, or the command of TRL that it is for."""
    scripts = {file.path.name for file in files if file.kind == "script" and not recipe_files.stands_alone(file)}
    found = []
    for path in paths:
        script = recipe or recipe_files.recipe_of(Path(path).read_text(encoding="utf-8")) or "sft.py"
        script = script if script.endswith(".py") or script.startswith("trl ") else f"{script}.py"
        if script.endswith(".py") and script not in scripts:
            raise LookupError(
                f"{path} is for {script}, which is no recipe with configurations:"
                f" --recipe takes {', '.join(sorted(scripts))}"
            )
        found.append((script.removesuffix(".py"), path))
    return found


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error.args[0]) if error.args else str(error)


def _write(text: str) -> None:
    """Print `text`; whoever reads only its first lines, as `head` does, gets no traceback."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> int:
    print(f"hf-tam recipes: {message}", file=sys.stderr)
    return 1
