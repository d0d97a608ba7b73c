"""The files of the recipes: where they are, what they are called and what their headers say."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import hf_tam

# A field of a header stands in a comment, "# Purpose:   text", and goes on in comments that are indented further.
_FIELD = re.compile(r"^# ([A-Z][\w ]*):\s+(.*)$")
_CONTINUATION = re.compile(r"^#\s{3,}(.*)$")


@dataclass(frozen=True)
class RecipeFile:
    """A file to start a run with.

    Attributes:
        kind: "script", "configuration", "launch" or "cluster".
        path: Where it is.
        place: Its path inside the folder of the recipes.
        purpose: What it is for, in one line.
        gigabytes: What a configuration needs for weights, gradients and states, as its header has it; or nothing.
    """

    kind: str
    path: Path
    place: str
    purpose: str
    gigabytes: str = ""

    @property
    def name(self) -> str:
        """What `list` calls it: sft.py, llama3.2-1b/lora, accelerate/ddp."""
        return self.place if self.kind == "script" else re.sub(r"^configs/|\.(yaml|json|sh)$", "", self.place)

    @property
    def names(self) -> set[str]:
        """Everything it may be called."""
        stem = self.place.rpartition(".")[0]
        names = {self.name, self.place, stem, f"recipes/{self.place}", self.place.removeprefix("configs/")}
        # A folder of configurations has a lora.yaml each: only here is the last part enough.
        return names if self.kind == "configuration" else names | {self.path.name, self.path.stem}


def find_folder() -> Path:
    """Return the folder that the package `recipes` is in: of the wheel, or of the checkout.

    Raises:
        FileNotFoundError: this installation came without the recipes.
    """
    package = Path(hf_tam.__file__).resolve().parent
    for folder in (package / "_recipes", package.parent):
        if (folder / "recipes" / "sft.py").is_file():
            return folder
    raise FileNotFoundError(f"{package} was installed without the recipes: install the wheel, or use a checkout.")


def list_files(folder: Path) -> list[RecipeFile]:
    """Return scripts, configurations, launch files and jobs for clusters, in this order."""
    recipes = folder / "recipes"
    found = [
        *(("script", path) for path in sorted(recipes.glob("*.py")) if path.name != "__init__.py"),
        *(("configuration", path) for path in sorted(recipes.glob("configs/*/*.yaml"), key=_by_model)),
        *(("launch", path) for path in sorted(recipes.glob("accelerate/*.*"))),
        *(("cluster", path) for path in sorted(recipes.glob("cluster/*.*"))),
    ]
    return [_read(kind, path, recipes) for kind, path in found]


def find_file(name: str, files: list[RecipeFile]) -> RecipeFile:
    """Return the file of that name.

    Raises:
        LookupError: there is none; the message names the nearest.
    """
    for file in files:
        if name in file.names:
            return file
    known = {alias: file.name for file in files for alias in sorted(file.names)}
    # The folder of a model stands for the files in it.
    near = [file.name for file in files if name and name in file.name][:5]
    near = near or [known[alias] for alias in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    advice = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "`hf-tam recipes list` has the names."
    raise LookupError(f"no recipe is called {name!r}; {advice}")


def stands_alone(script: RecipeFile) -> bool:
    """Whether a script imports nothing of the recipes, and so takes no configuration either."""
    found = ast.walk(ast.parse(script.path.read_text(encoding="utf-8")))
    return not any(isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("recipes.") for node in found)


def read_header(text: str) -> dict[str, str]:
    """Return the fields of the comment that a configuration begins with, each on one line."""
    fields: dict[str, str] = {}
    title = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if match := _FIELD.match(line):
            title = match[1]
            fields[title] = match[2]
        elif title and (match := _CONTINUATION.match(line)):
            fields[title] += f" {match[1]}"
    return fields


def recipe_of(text: str) -> str | None:
    """Return what a configuration's header launches: a script such as sft.py, or a command such as "trl grpo"."""
    match = re.search(r"\b(trl \w+|\w+\.py)\b", read_header(text).get("Launch", ""))
    return match[1] if match else None


def gigabytes_of(hardware: str) -> str:
    """Return the GB that a header's field Hardware begins with, or nothing."""
    match = re.match(r"(\d+(?:\.\d+)?) GB for weights, gradients and states\b", hardware)
    return match[1] if match else ""


def _read(kind: str, path: Path, recipes: Path) -> RecipeFile:
    text = path.read_text(encoding="utf-8")
    gigabytes = gigabytes_of(read_header(text).get("Hardware", ""))
    return RecipeFile(kind, path, path.relative_to(recipes).as_posix(), _purpose(path, text), gigabytes)


def _purpose(path: Path, text: str) -> str:
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].rstrip(".")
    if path.suffix == ".json":  # which has no comments
        return "for --deepspeed_config_file, as the header of zero3.yaml says"
    return re.split(r"[:;]\s|\.(?:\s|$)", read_header(text).get("Purpose", ""))[0]


def _by_model(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sort 8b before 30b: numbers in the folder's name by their size."""
    parts = re.split(r"(\d+)", path.parent.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], path.stem
