"""The table of configurations in recipes/README.md, from their headers.

python -m recipes.support.configs_table
"""

import re
from pathlib import Path

import yaml

from hf_tam.cli.recipe_files import find_folder, gigabytes_of, list_files, read_header

KINDS = ("lora", "qlora", "full")
_HEADER = f"| folder | model | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}"


def table() -> str:
    """Return a line for each folder, with memory and GPU of each file in it, in the order of `hf-tam recipes list`."""
    folders: dict[str, dict[str, Path]] = {}
    for file in list_files(find_folder()):
        if file.kind == "configuration" and file.path.stem in KINDS:
            folders.setdefault(file.path.parent.name, {})[file.path.stem] = file.path
    # A folder whose files are for other recipes has no Hardware in this form.
    lines = [_line(name, files) for name, files in folders.items() if all(map(_cell, files.values()))]
    return "\n".join([_HEADER, *lines])


def _line(name: str, files: dict[str, Path]) -> str:
    model = yaml.safe_load(files["lora"].read_text(encoding="utf-8"))["model_name_or_path"]
    cells = [_cell(files[kind]) if kind in files else "" for kind in KINDS]
    return f"| `{name}` | {model} | {' | '.join(cells)} |"


def _cell(path: Path) -> str:
    hardware = read_header(path.read_text(encoding="utf-8")).get("Hardware", "")
    memory = gigabytes_of(hardware)
    gpus = re.search(r"(?:one GPU|each of (\d+) GPUs) of (\d+) GB", hardware)
    return f"{memory} ({f'{gpus[1]} x ' if gpus[1] else ''}{gpus[2]})" if memory and gpus else ""


if __name__ == "__main__":
    print(table())
