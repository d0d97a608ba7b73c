"""The output directory: refused before any work is lost, and filled only once training starts."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from torch import nn

from hf_tam import torque_log
from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint
from recipes.support.arguments import RunArguments
from recipes.support.checkpoints import list_checkpoints
from recipes.support.errors import RecipeError
from recipes.support.models import parameter_size

METRICS_NAME = "metrics.jsonl"
RESULTS_NAME = "results.json"

# A checkpoint is written while the previous one still exists, and temporary files come on top.
_CHECKPOINTS_THAT_MUST_FIT = 2
# Weights, and two moments of the optimizer in fp32.
_OPTIMIZER_BYTES_PER_PARAMETER = 8


def check_output_directory(output_dir: Path, *, overwrite: bool, resuming: bool) -> None:
    """Refuse a directory that cannot be written, or that holds something nobody asked to continue or replace.

    Creates and changes nothing that stays.

    Communication: a barrier, with several processes.

    Raises:
        RecipeError: naming the directory and the flag that helps.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise RecipeError(f"output_dir {output_dir} is a file: give the name of a directory.")
    check_writable(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (overwrite or resuming):
        raise RecipeError(
            f"output_dir {output_dir} is not empty: give another one, --overwrite to replace the run in it,"
            " or --resume_from_checkpoint true to continue that run."
        )
    # No process may write before the slowest has looked, or it would find the directory in use.
    PartialState().wait_for_everyone()


def check_writable(output_dir: Path) -> None:
    """Write a megabyte to the nearest directory that exists, and remove it again.

    Raises:
        RecipeError: it cannot be written, or the disk is full.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(2**20))
            probe.flush()
    except OSError as error:
        raise RecipeError(f"output_dir {output_dir} cannot be written: {error.strerror}.") from error


def check_disk_space(output_dir: Path, model: nn.Module, *, full: bool) -> None:
    """Refuse to start where the checkpoints of `model` will not fit.

    Raises:
        RecipeError: with the space needed and the space free.
    """
    saved = [parameter for parameter in model.parameters() if full or parameter.requires_grad]
    weights = sum(parameter_size(parameter) * parameter.element_size() for parameter in saved)
    trained = sum(parameter_size(parameter) for parameter in saved if parameter.requires_grad)
    moments = trained * _OPTIMIZER_BYTES_PER_PARAMETER
    needed = _CHECKPOINTS_THAT_MUST_FIT * (weights + moments)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RecipeError(
            f"output_dir {output_dir}: two checkpoints of this model need {needed / 2**30:.2f} GiB and the disk has"
            f" {free / 2**30:.2f} GiB free: free some space or give another output_dir."
        )


def remove_earlier_run(output_dir: Path) -> None:
    """Remove the checkpoints and metrics of an earlier run, so that none of them passes for the new one's."""
    for checkpoint in list_checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    for name in (METRICS_NAME, RESULTS_NAME, torque_log.FILE_NAME):
        (output_dir / name).unlink(missing_ok=True)


def metrics_path(run: RunArguments, output_dir: Path) -> Path:
    """Where the metrics of this run are logged."""
    return Path(run.metrics_file) if run.metrics_file else output_dir / METRICS_NAME


@contextmanager
def naming_a_full_disk(output_dir: Path) -> Iterator[None]:
    """Name a full or vanished disk, which torch reports as an internal error of its zip writer.

    Raises:
        RecipeError: something failed, and nothing can be written to `output_dir` any more.
    """
    try:
        yield
    except Exception as error:
        try:
            check_writable(output_dir)
        except RecipeError as cause:
            complete = last_complete_checkpoint(output_dir)
            remedy = f"make room and resume from {complete}" if complete else "no checkpoint had been written"
            raise RecipeError(f"{cause} The run stopped: {remedy}.") from error
        raise
