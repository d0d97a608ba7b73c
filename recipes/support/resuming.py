"""What a run was started with, kept beside its checkpoints, and how a resumed one differs from it."""

import dataclasses
import glob
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from recipes.support import reporting
from recipes.support.output import RESULTS_NAME

ARGUMENTS_NAME = "arguments.json"

# What the optimizer's state brings back, whatever is asked for now.
_OF_THE_CHECKPOINT = ("learning_rate", "weight_decay", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")
# What may differ without making it another run.
_FREE = (
    "config",
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "merge",
    "metrics_file",
    "dry_run",
    "disable_tqdm",
)
_FREE += ("push_to_hub", "hub_model_id", "report_to", "logging_steps", "save_total_limit", "run_name", "project")

_FILES, _CONTENTS = ("train_file", "validation_file", "test_file"), "_contents"
_HASHED = 1 << 26
"""Bytes at each end of a file."""


def settings(groups: tuple[Any, ...]) -> dict[str, Any]:
    """Return every argument by its name, those of the Trainer included, as JSON has it."""
    values = {
        field.name: getattr(group, field.name)
        for group in groups
        for field in dataclasses.fields(group)
        if field.init and not field.name.endswith("_token")
    }
    kept = {name: value for name, value in values.items() if name not in _FREE}
    kept |= {f"{name}{_CONTENTS}": _fingerprint(values[name]) for name in _FILES if values.get(name)}
    read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return read


def record(output_dir: Path, given: dict[str, Any]) -> None:
    """Write what a run was started with, as `settings` returned it; on one process only."""
    path = output_dir / ARGUMENTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def compare(output_dir: Path, groups: tuple[Any, ...]) -> list[str]:
    """Say which arguments differ from those of the run that is continued, and keep those that it has to keep.

    The learning rate and what else the optimizer's state holds are those of the checkpoint: `groups` get them back,
    so that what is recorded is what was used.

    Returns:
        The names of those that differ and take effect; none too where nothing is known of the run.
    """
    try:
        earlier = json.loads((output_dir / ARGUMENTS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version, or of another program
        return []
    now = settings(groups)
    differing = [name for name in now if name in earlier and now[name] != earlier[name]]
    for name in [name for name in differing if name in _OF_THE_CHECKPOINT]:
        reporting.warn(f"resuming: {name} is {earlier[name]} in the checkpoint, which stays; {now[name]} is ignored")
        _give_back(groups, name, earlier[name])
    for name in [name for name in differing if name.endswith(_CONTENTS)]:
        reporting.warn(
            f"resuming: {name.removesuffix(_CONTENTS)} does not hold what it held when the run began: the records left"
            " are others, and in another order, than the run would have seen"
        )
    changed = [name for name in differing if name not in _OF_THE_CHECKPOINT and not name.endswith(_CONTENTS)]
    if changed:
        listed = ", ".join(f"{name} {earlier[name]} -> {now[name]}" for name in changed)
        reporting.warn(f"resuming with other arguments than those of the run that is continued: {listed}")
    return changed


def is_finished(output_dir: Path, resume_from: Path | None, changed: list[str]) -> bool:
    """Whether the run to resume came to its end, and nothing was asked for that would let it go on."""
    if resume_from is None or changed or not (output_dir / RESULTS_NAME).is_file():
        return False
    if resume_from.parent.resolve() != output_dir.resolve():
        return False
    results = json.loads((output_dir / RESULTS_NAME).read_text(encoding="utf-8"))
    return bool(results.get("steps") == int(resume_from.name.rpartition("-")[2]))


def _fingerprint(named: str | list[str]) -> str:
    """Return a hash of the files that an argument names: of all their bytes, or of a long one's size and its ends."""
    digest = hashlib.sha256()
    for pattern in [named] if isinstance(named, str) else named:
        for path in sorted(filter(os.path.isfile, glob.glob(str(pattern), recursive=True))):
            size = os.path.getsize(path)
            digest.update(str(size).encode())
            with open(path, "rb") as file:
                digest.update(file.read(_HASHED))
                file.seek(max(size - _HASHED, 0))
                digest.update(file.read(_HASHED))
    return digest.hexdigest()[:16]


def _give_back(groups: tuple[Any, ...], name: str, value: Any) -> None:
    for group in groups:
        if name in {field.name for field in dataclasses.fields(group)}:
            setattr(group, name, value)
