"""Tells whether a checkpoint folder of the Trainer is complete and unharmed before a run is resumed from it.

The Trainer itself starts a fresh optimizer when optimizer.pt or scheduler.pt is missing, and loads flipped bits.
Paths and files only: nothing here imports transformers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tam.integrations.checkpoint_files import (
    OUR_KEYS,
    STATE_FILE,
    Strategy,
    first_harm,
    is_readable_json,
    saved_by_ours,
)
from hf_tam.integrations.deepspeed import checkpoint as deepspeed_checkpoint
from hf_tam.integrations.wrapped import find_ours, innermost

# Names that the Trainer and accelerate give their files.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
SCHEDULER_FILE = "scheduler.pt"
CHECKSUM_FILE = "optimizer.sha256"  # ours, in the format of sha256sum

# Without these the Trainer would start a fresh optimizer; with DeepSpeed it looks for itself.
_REQUIRED: dict[Strategy, tuple[str, ...]] = {
    "whole": ("optimizer.pt", SCHEDULER_FILE),
    "fsdp_full": ("optimizer.bin", SCHEDULER_FILE),
    "fsdp_sharded": ("optimizer_0", SCHEDULER_FILE),
    "deepspeed": (),
}
_MODELS: dict[Strategy, str] = {"fsdp_full": "pytorch_model_fsdp.bin", "fsdp_sharded": "pytorch_model_fsdp_0"}
_SAVED_BY = {
    "optimizer.pt": "one process or DDP",
    "optimizer.bin": "FSDP with state_dict_type FULL_STATE_DICT",
    "optimizer_0": "FSDP with state_dict_type SHARDED_STATE_DICT",
}

logger = logging.getLogger("hf_tam")


def write_checksums(checkpoint: str | Path, strategy: Strategy = "whole") -> None:
    """Write the SHA-256 of the optimizer's and the scheduler's file beside them; of shards torch has its own notes."""
    folder = Path(checkpoint)
    names = _REQUIRED[strategy]
    if names and all((folder / name).exists() for name in names):
        lines = [f"{_sha256(folder / name)}  {name}\n" for name in names if (folder / name).is_file()]
        (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest checkpoint that was written to its end by all processes, passing over those that were not.

    One that was damaged afterwards is not passed over: `require_resumable` says what is wrong with it.

    Args:
        output_dir: Where a Trainer writes its `checkpoint-STEP` folders. Need not exist.
    """
    steps = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    }
    newest_first = (steps[step] for step in sorted(steps, reverse=True))
    return next((folder for folder in newest_first if is_readable_json(folder / STATE_FILE)), None)


def refuse_other_optimizer(checkpoint: str | Path, optim: str, strategy: Strategy = "whole") -> None:
    """Refuse to resume with another optimizer a checkpoint whose optimizer was one of ours.

    torch.optim.AdamW would take our normalised exp_avg for its own, without a word and without a shape that differs.

    Args:
        checkpoint: A `checkpoint-STEP` folder.
        optim: The `--optim` of the resuming run, none of ours.
        strategy: Who loads the optimizer; with DeepSpeed it is looked at once it is loaded.

    Raises:
        ValueError: What this run would load was saved by one of our optimizers.
    """
    path = _optimizer_of(Path(checkpoint), strategy)
    if path is not None and path.exists() and saved_by_ours(path):
        raise ValueError(misread_message(path, f"--optim {optim}"))


def misread_message(saved: str | Path, loader: str) -> str:
    """What is said where another optimizer loads a state of ours."""
    return (
        f"{saved} was saved by an optimizer of hf_tam, and {loader} would misread its first moment. Resume with the "
        "optimizer of that run; or load it there and save hf_tam.export_torch_state_dict(optimizer) in its place."
    )


def refuse_our_state(optimizer: Any, folder: str | Path) -> None:
    """Refuse an optimizer that is none of ours and has just loaded the state of one; torch keeps the param groups.

    Args:
        optimizer: The one that was loaded, wrapped or not.
        folder: Where from.

    Raises:
        ValueError: The param groups are of one of ours.
    """
    groups = getattr(optimizer, "param_groups", ())
    if find_ours(optimizer) is None and any(OUR_KEYS & set(group) for group in groups):
        raise ValueError(misread_message(folder, type(innermost(optimizer)).__name__))


def _optimizer_of(folder: Path, strategy: Strategy) -> Path | None:
    return next((folder / name for name in _REQUIRED[strategy] if name in OPTIMIZERS), None)


def require_resumable(
    checkpoint: str | Path,
    *,
    strategy: Strategy,
    weights_only_wanted: bool,
    world_size: int = 1,
    deepspeed_config: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a checkpoint that would resume another run than the one that was saved.

    Args:
        checkpoint: A `checkpoint-STEP` folder.
        strategy: Who loads the optimizer: the Trainer, from one file; or FSDP or DeepSpeed, from files of their own.
        weights_only_wanted: Whether a checkpoint without an optimizer is accepted (the run has `save_only_model`).
        world_size: How many processes resume.
        deepspeed_config: The configuration of DeepSpeed, where it loads the optimizer.

    Raises:
        ValueError: Naming the file that is missing, cut off or changed, and what to do.
    """
    folder = Path(checkpoint)
    earlier = functools.partial(_earlier_checkpoint, folder, strategy)
    if not is_readable_json(folder / STATE_FILE):
        raise ValueError(
            f"{folder / STATE_FILE} is missing or cut off: this checkpoint was not written to its end. {earlier()}"
        )
    required = _REQUIRED[strategy]
    missing = [name for name in required if not (folder / name).exists()]
    if missing and not any((folder / name).exists() for name in (*required, *OPTIMIZERS)) and weights_only_wanted:
        logger.warning("%s holds the model only: the optimizer and the schedule start afresh.", folder)
    elif missing:
        raise ValueError(_missing_message(folder, missing[0], strategy))
    if strategy in _MODELS and not (folder / _MODELS[strategy]).exists():
        raise ValueError(f"{folder / _MODELS[strategy]} is missing, and with it the model. {earlier()}")
    if strategy == "deepspeed":
        if weights_only_wanted:  # DeepSpeed itself asks for its shards
            return
        harm = deepspeed_checkpoint.first_harm(folder, world_size=world_size, config=deepspeed_config)
    else:
        harm = first_harm(folder, strategy) or _first_change(folder, strategy)
    if harm is not None:
        raise ValueError(f"{harm}. {earlier()}")


def _missing_message(folder: Path, name: str, strategy: Strategy) -> str:
    other = next((other for other in OPTIMIZERS if (folder / other).exists()), None)
    if name in OPTIMIZERS and other is not None:
        return (
            f"{folder / name} is missing, which this run would load: it is of {_SAVED_BY[name]}, and the checkpoint's "
            f"{other} was saved by {_SAVED_BY[other]}. Resume with the same kind of sharding and state_dict_type."
        )
    return (
        f"{folder / name} is missing, so the optimizer would start afresh. {_earlier_checkpoint(folder, strategy)} Or "
        "set save_only_model=True if a fresh optimizer is what you want."
    )


def _first_change(folder: Path, strategy: Strategy) -> str | None:
    """The first file that this run would load and that is another than the one whose checksum was written.

    Checksums that a run of ours has left beside the files of another optimizer's are not of these.
    """
    recorded = _recorded_checksums(folder)
    changed = [name for name in _REQUIRED[strategy] if name in recorded and recorded[name] != _sha256(folder / name)]
    optimizer = _optimizer_of(folder, strategy)
    if not changed or (optimizer is not None and saved_by_ours(optimizer) is False):
        return None
    return (
        f"{folder / changed[0]} is not the file that was saved: its SHA-256 differs from the one in {CHECKSUM_FILE} "
        f"(if you changed it on purpose, delete {CHECKSUM_FILE})"
    )


def _recorded_checksums(folder: Path) -> dict[str, str]:
    if not (folder / CHECKSUM_FILE).is_file():
        return {}
    lines = (folder / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _earlier_checkpoint(folder: Path, strategy: Strategy) -> str:
    earlier = [
        other
        for other in folder.parent.glob("checkpoint-*")
        if other != folder and is_readable_json(other / STATE_FILE) and first_harm(other, strategy) is None
    ]
    if not earlier:
        return "There is no other complete checkpoint beside it: start again."
    newest = max(earlier, key=lambda other: (other / STATE_FILE).stat().st_mtime)
    return f"Delete the folder and resume from {newest}."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
