"""Checkpoints of a hand-written loop: accelerate's save_state, of which a folder holds all or does not exist.

A checkpoint is written to checkpoint-STEP.partial and renamed when every process is done, so that a job that is killed
inside a save resumes from the one before. The manifest, written last, says how the run was split, and names every file
with its size.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from recipes.support.checkpoints import list_checkpoints
from recipes.support.errors import RecipeError
from recipes.support.parallel import describe_strategy

MANIFEST_NAME = "manifest.json"


@dataclass
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    strategy: str
    files: dict[str, int]


def save(accelerator: Accelerator, output_dir: Path, *, step: int, keep: int) -> Path:
    """Save the state after `step`, and remove all but the newest `keep` checkpoints.

    Communication: barriers, and under FSDP and DeepSpeed what these need to save.

    Returns:
        The folder of the checkpoint.
    """
    folder = output_dir / f"checkpoint-{step}"
    partial = folder.with_name(f"{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.save_state(str(partial), **({"exclude_frozen_parameters": True} if deepspeed else {}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(partial)): path.stat().st_size for path in partial.rglob("*") if path.is_file()}
        manifest = Manifest(step, describe_strategy(accelerator), files)
        (partial / MANIFEST_NAME).write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for older in _by_step(output_dir)[:-keep]:
            shutil.rmtree(older)
    accelerator.wait_for_everyone()
    return folder


def newest(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    complete = [folder for folder in _by_step(output_dir) if (folder / MANIFEST_NAME).is_file()]
    return complete[-1] if complete else None


def require_resumable(accelerator: Accelerator, folder: Path) -> None:
    """Refuse a checkpoint that is not complete, or that another kind of run wrote.

    Raises:
        RecipeError: naming the file and what to do.
    """
    manifest = _read_manifest(folder)
    for name, size in manifest.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes where {size} were written"
            raise RecipeError(
                f"resume_from_checkpoint: {folder / name} {state}: resume from another checkpoint, or start afresh."
            )
    strategy = describe_strategy(accelerator)
    if manifest.strategy != strategy:
        raise RecipeError(
            f"resume_from_checkpoint: {folder} was written by a run with {manifest.strategy}, this one is"
            f" {strategy}: launch it as that one was, or start afresh."
        )


def load(accelerator: Accelerator, folder: Path) -> int:
    """Load the state from `folder`, and return its step.

    Communication: what FSDP and DeepSpeed need to load.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    # The frozen weights are not in the checkpoint; those of the base are there already.
    accelerator.load_state(str(folder), **({"load_module_strict": False} if deepspeed else {}))
    return _read_manifest(folder).step


def leave_out_frozen_weights(accelerator: Accelerator) -> None:
    """Have save_state write the trained weights only, where each process holds a whole model.

    DeepSpeed has an option for it, which `save` gives; under FSDP save_state writes the frozen weights too.
    """
    accelerator.register_save_state_pre_hook(_keep_trained)
    accelerator.register_load_state_pre_hook(_load_trained)


def _keep_trained(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
    for index, state in enumerate(weights):
        trained = _trained_names(models[index])
        weights[index] = {name: tensor for name, tensor in state.items() if name in trained}


def _load_trained(models: list[Any], folder: str) -> None:
    """Load what `_keep_trained` left; accelerate then finds no model to load."""
    for model in models:
        state = load_file(Path(folder) / "model.safetensors")
        if state.keys() != _trained_names(model):
            raise RecipeError(f"resume_from_checkpoint: {folder} holds the weights of another model or adapter.")
        model.load_state_dict(state, strict=False)
    models.clear()


def _trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest(**json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"resume_from_checkpoint: {folder / MANIFEST_NAME} is missing or cannot be read: this is no complete"
            " checkpoint of this script."
        ) from error


def _by_step(output_dir: Path) -> list[Path]:
    return sorted(list_checkpoints(output_dir), key=lambda folder: int(re.sub(r"\D", "", folder.name)))
