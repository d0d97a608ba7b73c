"""Tells whether a checkpoint folder of the Trainer is complete and unharmed before a run is resumed from it.

The Trainer itself starts a fresh optimizer when optimizer.pt or scheduler.pt is missing, and loads flipped bits.
Paths and files only: nothing here imports transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Literal

# Names that the Trainer gives its files. The state is the last one it writes.
STATE_FILE = "trainer_state.json"
RESUMED_FILES = ("optimizer.pt", "scheduler.pt")
CHECKSUM_FILE = "optimizer.sha256"  # ours, in the format of sha256sum

# Without these the Trainer would start a fresh optimizer; with DeepSpeed it looks for itself.
Strategy = Literal["whole", "fsdp", "deepspeed"]
_REQUIRED: dict[Strategy, tuple[str, ...]] = {
    "whole": RESUMED_FILES,
    "fsdp": ("optimizer*", "scheduler.pt"),
    "deepspeed": (),
}

logger = logging.getLogger("hf_tam")


def write_checksums(checkpoint: str | Path) -> None:
    """Write the SHA-256 of the optimizer's and the scheduler's file beside them; only where each is a single file."""
    folder = Path(checkpoint)
    if all((folder / name).is_file() for name in RESUMED_FILES):
        lines = [f"{_sha256(folder / name)}  {name}\n" for name in RESUMED_FILES]
        (folder / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest checkpoint that was written to its end, passing over those that were not.

    Args:
        output_dir: Where a Trainer writes its `checkpoint-STEP` folders. Need not exist.
    """
    steps = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    }
    return next((steps[step] for step in sorted(steps, reverse=True) if _is_readable_json(steps[step])), None)


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
    if (folder / CHECKSUM_FILE).is_file() and (folder / "optimizer.pt").is_file():
        raise ValueError(
            f"{folder / 'optimizer.pt'} was saved by an optimizer of hf_tam, and --optim {optim} would misread its "
            "first moment. Resume with the --optim of that run; or load it there, save "
            f"hf_tam.export_torch_state_dict(optimizer) in its place and delete {CHECKSUM_FILE}."
        )


def require_resumable(checkpoint: str | Path, *, strategy: Strategy, weights_only_wanted: bool) -> None:
    """Refuse a checkpoint that would resume another run than the one that was saved.

    Args:
        checkpoint: A `checkpoint-STEP` folder.
        strategy: Who loads the optimizer: the Trainer, from one file; or FSDP or DeepSpeed, from files of their own.
        weights_only_wanted: Whether a checkpoint without an optimizer is accepted (the run has `save_only_model`).

    Raises:
        ValueError: Naming the file that is missing, cut off or changed, and what to do.
    """
    folder = Path(checkpoint)
    if not _is_readable_json(folder):
        raise ValueError(
            f"{folder / STATE_FILE} is missing or cut off: this checkpoint was not written to its end. "
            f"{_earlier_checkpoint(folder)}"
        )
    missing = [name for name in _REQUIRED[strategy] if not any(folder.glob(name))]
    if missing and missing == list(_REQUIRED[strategy]) and weights_only_wanted:
        logger.warning("%s holds the model only: the optimizer and the schedule start afresh.", folder)
    elif missing:
        raise ValueError(
            f"{folder / missing[0]} is missing, so the optimizer would start afresh. Resume from a checkpoint of "
            f"a run with the same kind of sharding (here: {strategy}), or set save_only_model=True if a fresh "
            "optimizer is what you want."
        )
    elif strategy == "whole":
        _require_unharmed(folder)


def _require_unharmed(folder: Path) -> None:
    """Compare with the checksums; without them (the checkpoint of another optimizer), see that no end is missing."""
    recorded: dict[str, str] = {}
    if (folder / CHECKSUM_FILE).is_file():
        lines = (folder / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
        recorded = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in RESUMED_FILES:
        path = folder / name
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is cut off or not a torch.save file. {_earlier_checkpoint(folder)}")
        if recorded and recorded.get(name) != _sha256(path):
            raise ValueError(
                f"{path} is not the file that was saved: its SHA-256 differs from the one in {CHECKSUM_FILE}. "
                f"{_earlier_checkpoint(folder)} If you changed it on purpose, delete {CHECKSUM_FILE}."
            )


def _earlier_checkpoint(folder: Path) -> str:
    earlier = [other for other in folder.parent.glob("checkpoint-*") if other != folder and _is_readable_json(other)]
    if not earlier:
        return "There is no other complete checkpoint beside it: start again."
    newest = max(earlier, key=lambda other: (other / STATE_FILE).stat().st_mtime)
    return f"Delete the folder and resume from {newest}."


def _is_readable_json(folder: Path) -> bool:
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
