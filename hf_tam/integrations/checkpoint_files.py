"""Whether the files of a checkpoint folder are there to their last byte: the Trainer's, accelerate's and torch's.

A kill, a full disk or a forgotten copy leaves files that are cut off or missing; what is loaded of them is an opaque
error at best. What another kind of sharding has left in the same folder is passed over: nobody would load it. Nothing
here imports transformers or accelerate.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hf_tam.integrations.deepspeed import checkpoint as deepspeed_checkpoint

STATE_FILE = "trainer_state.json"
"""The last file that the Trainer writes."""
COMPLETE_FILE = "complete.json"
"""Ours, beside the files of `Accelerator.save_state`: empty while they are written, then the size of each."""
METADATA_FILE = ".metadata"
"""The last file of torch.distributed.checkpoint: which bytes of which file hold which part of a tensor."""

# What is known by its name; whatever else a user keeps in the folder is passed over.
_SHARDED_FOLDER = re.compile(r"(optimizer|pytorch_model_fsdp)_\d+")
_TORCH_SAVED = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|pytorch_model|sampler|dl_state_dict|custom_checkpoint)"
    r"[-\w]*\.(pt|pth|bin|pkl)"
)
_SAFETENSORS = re.compile(r"(adapter_)?model[-\w]*\.safetensors")


Strategy = Literal["whole", "prepared", "fsdp_full", "fsdp_sharded", "deepspeed"]
"""Who reads a checkpoint: a Trainer, or an Accelerator's `load_state`, of one process or DDP; FSDP, by its
state_dict_type; DeepSpeed."""
_READ_BY: dict[Strategy, str] = {
    "whole": r"optimizer\.pt",
    "prepared": r"optimizer(_\d+)?\.bin",
    "fsdp_full": r"(optimizer|pytorch_model_fsdp)(_\d+)?\.bin",
    "fsdp_sharded": _SHARDED_FOLDER.pattern,
    "deepspeed": r"(?!)",  # folders of its own choice
}
_READ_BY_SOME = re.compile("|".join(_READ_BY.values()))


def is_read_by(strategy: Strategy, name: str) -> bool:
    """Whether a file or folder of a checkpoint is none that only other strategies read."""
    return re.fullmatch(_READ_BY[strategy], name) is not None or _READ_BY_SOME.fullmatch(name) is None


def first_harm(folder: Path, strategy: Strategy) -> str | None:
    """The first file that `strategy` reads and that is cut off or missing beside others, as "PATH is ..."; or None."""
    return next(_harms(folder, strategy), None)


def _harms(folder: Path, strategy: Strategy) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if not is_read_by(strategy, path.name):
            continue
        if path.is_dir():
            if _SHARDED_FOLDER.fullmatch(path.name):
                yield from _harms_of_shards(path)
        elif _TORCH_SAVED.fullmatch(path.name) and not zipfile.is_zipfile(path):
            yield f"{path} is cut off or not a torch.save file"
        elif _SAFETENSORS.fullmatch(path.name) and not _is_whole_safetensors(path):
            yield f"{path} is cut off"


def _harms_of_shards(folder: Path) -> Iterator[str]:
    """Compare the shards with what torch.distributed.checkpoint has noted of them when all had been written."""
    if not (folder / METADATA_FILE).is_file():
        yield f"{folder / METADATA_FILE} is missing: the shards beside it were not written to their end"
        return
    metadata = read_metadata(folder)
    if metadata is None:
        yield f"{folder / METADATA_FILE} is cut off or damaged"
        return
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size < end:
            yield f"{path} is cut off: it has {path.stat().st_size} bytes of at least {end}"


def read_metadata(folder: Path) -> Any | None:
    """What torch.distributed.checkpoint has noted of a folder; None where it is missing or damaged.

    It is a pickle, which torch itself would load in the next moment: load checkpoints of people you trust only.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        return FileSystemReader(folder).read_metadata()
    except Exception:  # a damaged pickle raises anything
        return None


OUR_KEYS = {"damping_eps", "torque"}
"""What the param groups, and the states, of an optimizer of ours have and others' have not."""


def saved_by_ours(path: Path) -> bool | None:
    """Whether an optimizer of ours has saved a file, or a folder of shards; None where that cannot be read."""
    import torch

    if path.is_dir():
        metadata = read_metadata(path)
        return None if metadata is None else any(name.endswith(".torque") for name in metadata.state_dict_metadata)
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # the moments stay on the disk
        return any(OUR_KEYS & set(entry) for entry in (*saved["param_groups"], *saved["state"].values()))
    except Exception:  # a damaged file raises anything
        return None


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says: 8 bytes, the header's length, come first."""
    content_start = 8
    with path.open("rb") as file:
        length = int.from_bytes(file.read(content_start), "little")
        try:
            header = json.loads(file.read(length))
        except (ValueError, OverflowError, MemoryError):
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size >= content_start + length + max(ends, default=0)


def is_readable_json(path: Path) -> bool:
    """Whether a JSON file is there to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True


def invalidate(folder: Path) -> None:
    """Before a folder is written anew, remove what would make it look complete when that is broken off halfway."""
    for name in (STATE_FILE, COMPLETE_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(f"*/{METADATA_FILE}"):
        if _SHARDED_FOLDER.fullmatch(path.parent.name):
            path.unlink(missing_ok=True)


def mark_incomplete(folder: Path) -> None:
    """Before the files of `save_state` are written, say that they are not all there."""
    invalidate(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE_FILE).touch()


def mark_complete(folder: Path, strategy: Strategy) -> None:
    """Note the size of every file of `save_state`; only once every process has written its own."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _known_files(folder, strategy)}
    (folder / COMPLETE_FILE).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _known_files(folder: Path, strategy: Strategy) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not is_read_by(strategy, path.name):
            continue
        if path.is_dir() and _SHARDED_FOLDER.fullmatch(path.name):
            yield from sorted(path.iterdir())
        elif path.is_dir():
            yield from deepspeed_checkpoint.shards_in(path) if strategy == "deepspeed" else ()
        elif _TORCH_SAVED.fullmatch(path.name) or _SAFETENSORS.fullmatch(path.name):
            yield path


def forget_completion(folder: Path) -> None:
    """Before the files of `save_state` are written for other optimizers, drop what was noted of those of ours."""
    (folder / COMPLETE_FILE).unlink(missing_ok=True)


def first_deviation(folder: Path) -> str | None:
    """What in a folder is not as `mark_complete` noted it, as "PATH is ..."; None if nothing is, or nothing was noted.

    The end of a save that was broken off is not noted.
    """
    path = folder / COMPLETE_FILE
    if not path.exists():
        return None
    if not is_readable_json(path):
        return f"{path} is empty or cut off: the files beside it were not written to their end"
    for name, size in json.loads(path.read_text(encoding="utf-8")).items():
        noted = folder / name
        if not noted.is_file():
            return f"{noted} is missing"
        if noted.stat().st_size != size:
            return f"{noted} is cut off or was changed: it has {noted.stat().st_size} bytes of {size}"
    return None
