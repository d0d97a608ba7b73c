"""Whether DeepSpeed's shards of a checkpoint are there to their last byte, and are of as many processes as load them.

DeepSpeed itself names a missing file only sometimes, and where the numbers of processes differ some ranks end with a
bare assertion. Paths and files only: nothing here imports deepspeed.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

_SHARD = re.compile(r"(?P<kind>(?:bf16_)?zero_pp_rank_)(?P<rank>\d+)(?P<rest>_mp_rank_\d+_optim_states\.pt)")
_LATEST_FILES = ("latest", "latest_universal")
_CONVERSION = (
    'convert it with `python -m deepspeed.checkpoint.ds_to_universal` and set "checkpoint": {"load_universal": true} '
    "in the DeepSpeed configuration, or start as many processes as saved it"
)


def first_harm(checkpoint: Path, *, world_size: int) -> str | None:
    """What keeps DeepSpeed from loading a checkpoint, as "PATH is ..." or "PATH has ..."; None if nothing does.

    Args:
        checkpoint: The folder that was given to DeepSpeed: the Trainer's `checkpoint-STEP`, or that of `save_state`.
        world_size: How many processes will load it.
    """
    folders = [folder for folder in sorted(checkpoint.iterdir()) if folder.is_dir() and _shards(folder)]
    if not folders:
        if (checkpoint / _LATEST_FILES[1]).is_file():
            return None  # a universal checkpoint beside shards that were deleted
        return f"{checkpoint} has no optimizer shards of DeepSpeed's (*_optim_states.pt)"
    if not any((checkpoint / name).is_file() for name in _LATEST_FILES):
        return f"{checkpoint / _LATEST_FILES[0]} is missing"
    cut = next((path for path in sorted(folders[-1].glob("*.pt")) if not zipfile.is_zipfile(path)), None)
    if cut is not None:
        return f"{cut} is cut off or not a torch.save file"
    if (checkpoint / _LATEST_FILES[1]).is_file():
        return None
    return _first_gap(folders[-1], world_size)


def shards_in(folder: Path) -> list[Path]:
    """Every file of a folder, if it is one of DeepSpeed's with shards in it."""
    return [path for path in sorted(folder.iterdir()) if path.is_file()] if _shards(folder) else []


def _shards(folder: Path) -> dict[int, re.Match[str]]:
    """The optimizer's shards by rank."""
    matches = (_SHARD.fullmatch(path.name) for path in folder.iterdir())
    return {int(match["rank"]): match for match in matches if match is not None}


def _first_gap(folder: Path, world_size: int) -> str | None:
    shards = _shards(folder)
    any_match = next(iter(shards.values()))
    for rank in range(max(shards)):
        if rank not in shards:
            name = f"{any_match['kind']}{rank}{any_match['rest']}"
            return f"{folder / name} is missing"
    if len(shards) != world_size:
        return (
            f"{folder} has the optimizer shards of {len(shards)} process(es), and {world_size} are to load them: "
            f"unless some are missing, {_CONVERSION}"
        )
    return None
