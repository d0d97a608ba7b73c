"""Tells whether a checkpoint folder of the Trainer is complete and unharmed before a run is resumed from it.

The Trainer itself starts a fresh optimizer when optimizer.pt or scheduler.pt is missing, and loads flipped bits.
Paths and files only: nothing here imports transformers.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Literal

from hf_tam.integrations import deepspeed_checkpoint
from hf_tam.integrations.checkpoint_files import STATE_FILE, first_harm, is_readable_json

# Names that the Trainer and accelerate give their files.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
SCHEDULER_FILE = "scheduler.pt"
CHECKSUM_FILE = "optimizer.sha256"  # ours, in the format of sha256sum

# Without these the Trainer would start a fresh optimizer; with DeepSpeed it looks for itself.
Strategy = Literal["whole", "fsdp_full", "fsdp_sharded", "deepspeed"]
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


def write_checksums(checkpoint: str | Path) -> None:
    """Write the SHA-256 of the optimizer's and the scheduler's file beside them; of shards torch has its own notes."""
    folder = Path(checkpoint)
    if (folder / SCHEDULER_FILE).is_file() and any((folder / name).exists() for name in OPTIMIZERS):
        lines = [
            f"{_sha256(folder / name)}  {name}\n"
            for name in (*OPTIMIZERS, SCHEDULER_FILE)
            if (folder / name).is_file()
        ]
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


def refuse_other_optimizer(checkpoint: str | Path, optim: str) -> None:
    """Refuse to resume with another optimizer a checkpoint whose optimizer was one of ours.

    torch.optim.AdamW would take our normalised exp_avg for its own, without a word and without a shape that differs.

    Args:
        checkpoint: A `checkpoint-STEP` folder.
        optim: The `--optim` of the resuming run, none of ours.

    Raises:
        ValueError: The folder has the checksums that our optimizers write.
    """
    folder = Path(checkpoint)
    saved = next((name for name in OPTIMIZERS if (folder / name).exists()), None)
    if (folder / CHECKSUM_FILE).is_file() and saved is not None:
        export = "save hf_tam.export_torch_state_dict(optimizer) in its place"
        raise ValueError(
            f"{folder / saved} was saved by an optimizer of hf_tam, and --optim {optim} would misread its first "
            f"moment. Resume with the --optim of that run; or load it there, {export} and delete {CHECKSUM_FILE}."
        )


def require_resumable(
    checkpoint: str | Path, *, strategy: Strategy, weights_only_wanted: bool, world_size: int = 1
) -> None:
    """Refuse a checkpoint that would resume another run than the one that was saved.

    Args:
        checkpoint: A `checkpoint-STEP` folder.
        strategy: Who loads the optimizer: the Trainer, from one file; or FSDP or DeepSpeed, from files of their own.
        weights_only_wanted: Whether a checkpoint without an optimizer is accepted (the run has `save_only_model`).
        world_size: How many processes resume.

    Raises:
        ValueError: Naming the file that is missing, cut off or changed, and what to do.
    """
    folder = Path(checkpoint)
    if not is_readable_json(folder / STATE_FILE):
        raise ValueError(
            f"{folder / STATE_FILE} is missing or cut off: this checkpoint was not written to its end. "
            f"{_earlier_checkpoint(folder)}"
        )
    required = _REQUIRED[strategy]
    missing = [name for name in required if not (folder / name).exists()]
    if missing and not any((folder / name).exists() for name in (*required, *OPTIMIZERS)) and weights_only_wanted:
        logger.warning("%s holds the model only: the optimizer and the schedule start afresh.", folder)
    elif missing:
        raise ValueError(_missing_message(folder, missing[0]))
    if strategy in _MODELS and not (folder / _MODELS[strategy]).exists():
        raise ValueError(
            f"{folder / _MODELS[strategy]} is missing, and with it the model. {_earlier_checkpoint(folder)}"
        )
    if strategy == "deepspeed":
        if weights_only_wanted:  # DeepSpeed itself asks for its shards
            return
        harm = deepspeed_checkpoint.first_harm(folder, world_size=world_size)
        if harm is not None:
            raise ValueError(f"{harm}. {_earlier_checkpoint(folder)}")
    else:
        _require_unharmed(folder)


def _missing_message(folder: Path, name: str) -> str:
    other = next((other for other in OPTIMIZERS if (folder / other).exists()), None)
    if name in OPTIMIZERS and other is not None:
        return (
            f"{folder / name} is missing, which this run would load: it is of {_SAVED_BY[name]}, and the checkpoint's "
            f"{other} was saved by {_SAVED_BY[other]}. Resume with the same kind of sharding and state_dict_type."
        )
    return (
        f"{folder / name} is missing, so the optimizer would start afresh. {_earlier_checkpoint(folder)} Or set "
        "save_only_model=True if a fresh optimizer is what you want."
    )


def _require_unharmed(folder: Path) -> None:
    """No file may be cut off, nor be another than the one whose checksum was written."""
    harm = first_harm(folder)
    if harm is not None:
        raise ValueError(f"{harm}. {_earlier_checkpoint(folder)}")
    for name, digest in _recorded_checksums(folder).items():
        path = folder / name
        if not path.is_file() or digest != _sha256(path):
            raise ValueError(
                f"{path} is not the file that was saved: its SHA-256 differs from the one in {CHECKSUM_FILE}. "
                f"{_earlier_checkpoint(folder)} If you changed it on purpose, delete {CHECKSUM_FILE}."
            )


def _recorded_checksums(folder: Path) -> dict[str, str]:
    if not (folder / CHECKSUM_FILE).is_file():
        return {}
    lines = (folder / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _earlier_checkpoint(folder: Path) -> str:
    earlier = [
        other
        for other in folder.parent.glob("checkpoint-*")
        if other != folder and is_readable_json(other / STATE_FILE) and first_harm(other) is None
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
