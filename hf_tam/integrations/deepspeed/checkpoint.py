"""Whether DeepSpeed's shards of a checkpoint are there to their last byte, and are of as many processes as load them.

DeepSpeed itself names a missing file only sometimes, and where the numbers of processes differ some ranks end with a
bare assertion. Paths and files only: nothing here imports deepspeed.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tam.integrations.deepspeed.config import zero_stage

_SHARD = re.compile(r"(?P<kind>(?:bf16_)?zero_pp_rank_)(?P<rank>\d+)(?P<rest>_mp_rank_\d+_optim_states\.pt)")
_LATEST_FILES = ("latest", "latest_universal")
_LOAD_UNIVERSAL = 'set "checkpoint": {"load_universal": true} in the DeepSpeed configuration'
_CONVERSION = (
    f"convert it with `python -m deepspeed.checkpoint.ds_to_universal` and {_LOAD_UNIVERSAL}, or start as many "
    "processes as saved it"
)


def first_harm(checkpoint: Path, *, world_size: int, config: Mapping[str, Any] | None = None) -> str | None:
    """What keeps DeepSpeed from loading a checkpoint, as "PATH is ..." or "PATH has ..."; None if nothing does.

    Judged is what would be loaded: shards of another run, or of more processes, may lie beside it.

    Args:
        checkpoint: The folder that was given to DeepSpeed: the Trainer's `checkpoint-STEP`, or that of `save_state`.
        world_size: How many processes will load it.
        config: The DeepSpeed configuration; None is one of plain ZeRO.
    """
    options = {} if config is None else config.get("checkpoint") or {}
    latest, latest_universal = checkpoint / "latest", checkpoint / "latest_universal"
    if options.get("load_universal") and latest_universal.is_file():
        return None  # of any number of processes, and DeepSpeed names what is missing
    if not latest.is_file():
        if latest_universal.is_file():
            return f"{checkpoint} has a universal checkpoint only: {_LOAD_UNIVERSAL}"
        found = any(_shards(folder) for folder in checkpoint.iterdir() if folder.is_dir())
        return f"{latest} is missing" if found else f"{checkpoint} has no optimizer shards of DeepSpeed's"
    folder = checkpoint / latest.read_text(encoding="utf-8").strip()
    if config is not None and zero_stage(config) == 0:
        return _harm_without_zero(folder)
    if not folder.is_dir() or not _shards(folder):
        return f"{folder} has no optimizer shards of DeepSpeed's (*_optim_states.pt)"
    return _harm_of_shards(folder, world_size, node_local=bool(options.get("use_node_local_storage")))


def shards_in(folder: Path) -> list[Path]:
    """Every file of a folder, if it is one of DeepSpeed's with shards in it."""
    return [path for path in sorted(folder.iterdir()) if path.is_file()] if _shards(folder) else []


def _shards(folder: Path) -> dict[int, re.Match[str]]:
    """The optimizer's shards by rank."""
    matches = (_SHARD.fullmatch(path.name) for path in folder.iterdir())
    return {int(match["rank"]): match for match in matches if match is not None}


def _harm_without_zero(folder: Path) -> str | None:
    """Without ZeRO the optimizer's state is in the model's file, whole."""
    path = folder / "mp_rank_00_model_states.pt"
    if not path.is_file():
        return f"{path} is missing"
    return None if zipfile.is_zipfile(path) else _cut_off(path)


def _cut_off(path: Path) -> str:
    return f"{path} is cut off or not a torch.save file"


def _harm_of_shards(folder: Path, world_size: int, *, node_local: bool) -> str | None:
    shards = _shards(folder)
    saved_by = _number_of_savers(folder) or max(shards) + 1
    for path in sorted(folder.glob("*.pt")):
        match = _SHARD.fullmatch(path.name)
        if (match is None or int(match["rank"]) < saved_by) and not zipfile.is_zipfile(path):
            return _cut_off(path)
    if node_local:  # each machine has the shards of its own processes
        return None
    any_match = next(iter(shards.values()))
    for rank in range(saved_by):
        if rank not in shards:
            name = f"{any_match['kind']}{rank}{any_match['rest']}"
            return f"{folder / name} is missing"
    if saved_by != world_size:
        return (
            f"{folder} has the optimizer shards of {saved_by} process(es), and {world_size} are to load them: "
            f"unless some are missing, {_CONVERSION}"
        )
    return None


def _number_of_savers(folder: Path) -> int | None:
    """Over how many processes a checkpoint was saved, as DeepSpeed has noted it; None where that cannot be read."""
    import torch

    # The newest: an earlier run in the same folder, with another stage, has left a file of another name.
    files = sorted(folder.glob("*mp_rank_00*_model_states.pt"), key=lambda path: path.stat().st_mtime_ns)
    try:
        size = torch.load(files[-1], map_location="cpu", mmap=True, weights_only=True)["dp_world_size"]
    except Exception:  # there is none, it is damaged, or the user has put into it what is no tensor
        return None
    return int(size)
