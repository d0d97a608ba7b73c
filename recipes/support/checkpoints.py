"""Which checkpoint a run resumes from."""

import re
from pathlib import Path

from transformers import TrainingArguments

from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint, require_resumable
from recipes.support.errors import RecipeError

_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return every checkpoint folder, complete or not."""
    return sorted(path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT_NAME.fullmatch(path.name))


def wants_resume(choice: str | None) -> bool:
    """Whether `--resume_from_checkpoint` tells this run to continue another, if there is one."""
    return (choice or "false").lower() != "false"


def checkpoint_to_resume(training: TrainingArguments) -> Path | None:
    """Resolve `--resume_from_checkpoint`: nothing, `true`, `auto`, or a folder.

    `true` is the newest complete checkpoint in output_dir, which must exist; with `auto` the run starts afresh where
    there is none, so that one command serves a job that may be killed at any time. Incomplete folders are passed over.

    Raises:
        RecipeError: there is no checkpoint to resume from, or it is damaged.
    """
    folder = _choose_checkpoint(training.resume_from_checkpoint, Path(training.output_dir))
    # Sharded checkpoints have other files; the Trainer's own path checks those.
    if folder is not None and training.world_size == 1:
        _require_resumable(folder, training)
    return folder


def _choose_checkpoint(choice: str | None, output_dir: Path) -> Path | None:
    if not wants_resume(choice):
        return None
    keyword = str(choice).lower()
    folder = last_complete_checkpoint(output_dir) if keyword in ("true", "auto") else Path(str(choice))
    if folder is None and keyword == "true":
        incomplete = ", ".join(path.name for path in list_checkpoints(output_dir))
        raise RecipeError(
            f"resume_from_checkpoint is {choice}, but {output_dir} has no complete checkpoint"
            + (f" (incomplete: {incomplete})." if incomplete else ".")
            + " Give the folder of one, or 'auto' to start afresh in that case."
        )
    return folder


def _require_resumable(folder: Path, training: TrainingArguments) -> None:
    try:
        require_resumable(folder, strategy="whole", weights_only_wanted=training.save_only_model)
    except ValueError as error:
        raise RecipeError(f"resume_from_checkpoint: {error}") from error
