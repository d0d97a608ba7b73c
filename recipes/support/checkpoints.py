"""Which checkpoint folders are whole, and which one a run resumes from.

The Trainer writes a checkpoint file by file, so a killed process leaves a folder that looks like one. A manifest of the
files and their sizes is put into the folder last; a folder that differs from its manifest, or has none, is not whole.
"""

import json
import os
import re
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.support.errors import RecipeError

MANIFEST = "manifest.json"
_TRAINER_STATE = "trainer_state.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class ManifestCallback(TrainerCallback):
    """Marks each checkpoint as whole, once the Trainer has written all of it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the manifest of the checkpoint of this step, on the main process."""
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def write_manifest(folder: Path) -> None:
    """List the files of `folder` and their sizes in bytes; appears whole or not at all."""
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(_file_sizes(folder), indent=1), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def damaged_files(folder: Path) -> list[str]:
    """Return what differs from the manifest of `folder`: names of files; the manifest's own when there is none."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [MANIFEST]
    actual = _file_sizes(folder)
    return [name for name, size in expected.items() if actual.get(name) != size]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return every checkpoint folder, whole or not, newest first."""
    if not output_dir.is_dir():
        return []
    steps = {path: _CHECKPOINT_NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir()}
    return sorted((path for path, match in steps.items() if match), key=lambda path: -int(steps[path].group(1)))


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of `output_dir`, passing over the others."""
    return next((path for path in list_checkpoints(output_dir) if not damaged_files(path)), None)


def checkpoint_to_resume(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """Resolve `--resume_from_checkpoint`: nothing, `true`, `auto`, or a folder.

    Args:
        resume_from_checkpoint: `true` is the newest whole checkpoint of `output_dir`, which must exist; with `auto` the
            run starts afresh where there is none, so that one command serves a job that may be stopped at any time.
        output_dir: where this run writes.

    Raises:
        RecipeError: there is no checkpoint to resume from, or the one that was named is not whole.
    """
    choice = (resume_from_checkpoint or "false").lower()
    if choice == "false":
        return None
    if choice in ("true", "auto"):
        found = newest_whole_checkpoint(output_dir)
        if found is None and choice == "true":
            passed_over = ", ".join(path.name for path in list_checkpoints(output_dir))
            raise RecipeError(
                f"resume_from_checkpoint is true, but {output_dir} holds no whole checkpoint"
                + (f" (incomplete: {passed_over})." if passed_over else ".")
                + " Give the folder of one, or 'auto' to start afresh in that case."
            )
        return found
    return _named_checkpoint(Path(resume_from_checkpoint or ""))


def _named_checkpoint(folder: Path) -> Path:
    if not (folder / _TRAINER_STATE).is_file():
        raise RecipeError(f"resume_from_checkpoint: {folder} is no checkpoint folder ({_TRAINER_STATE} is not in it).")
    # A checkpoint of a plain Trainer has no manifest, and the user asked for this one by name.
    if (folder / MANIFEST).is_file() and (damaged := damaged_files(folder)):
        raise RecipeError(
            f"resume_from_checkpoint: {folder} is incomplete; missing or cut short: {', '.join(damaged)}."
            " Name an older checkpoint, or 'true' for the newest whole one."
        )
    return folder


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(MANIFEST))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
