"""One way to run a Trainer: resumable, interruptible, and clear when the disk fills up."""

import sys
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from hf_tam import TorqueCallback
from hf_tam.integrations.transformers.patches import uses_ours
from recipes.support import early_checks, narrow_weights, reporting, speed
from recipes.support import resuming as resuming_runs
from recipes.support.arguments import RunArguments
from recipes.support.checkpoints import checkpoint_to_resume, wants_resume
from recipes.support.errors import NothingToDo, RecipeError
from recipes.support.interruption import Interruption, InterruptionCallback, announce_stop, checkpoint_written
from recipes.support.models import require_weights
from recipes.support.output import check_output_directory, metrics_path, naming_a_full_disk, remove_earlier_run
from recipes.support.parallel import describe_strategy, leave_embeddings_apart, leave_group
from recipes.support.reporting import MetricsFileCallback
from recipes.support.spikes import grad_norm_metrics


def check_run(*groups: Any) -> Path | None:
    """Check arguments, output directory and checkpoint before anything slow is done.

    Communication: a barrier, with several processes.

    Args:
        groups: the arguments, of which the first are how the run starts and the last the Trainer's.

    Returns:
        The checkpoint to resume from, if the run goes on from one.

    Raises:
        RecipeError: the run cannot start, and why.
        NothingToDo: the run to resume has come to its end.
    """
    run, training = groups[0], groups[-1]
    early_checks.check(training)
    narrow_weights.keep_steps(groups)
    if training.disable_tqdm:  # which covers the Trainer's own bars alone
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    resuming = wants_resume(training.resume_from_checkpoint)
    output_dir = Path(training.output_dir)
    check_output_directory(output_dir, overwrite=run.overwrite, resuming=resuming)
    if run.overwrite and not resuming and output_dir.is_dir() and any(output_dir.iterdir()):
        reporting.announce(f"replacing the run in {output_dir} (overwrite; another --output_dir keeps it)")
    resume_from = checkpoint_to_resume(training)
    if resume_from and getattr(training, "sync_ref_model", False):
        raise RecipeError(
            f"resume_from_checkpoint: {resume_from} holds no reference, which sync_ref_model had moved by then, so the"
            " run would be another one: start it anew (--overwrite), or resume without sync_ref_model."
        )
    changed = resuming_runs.compare(output_dir, groups) if resume_from else []
    if resuming_runs.is_finished(output_dir, resume_from, changed):
        raise NothingToDo(
            f"the run in {output_dir} is finished, and stays as it is (num_train_epochs or max_steps go on)"
        )
    run.given = resuming_runs.settings(groups)
    return resume_from


def train(trainer: Trainer, run: RunArguments, *, resume_from: Path | None) -> dict[str, Any]:
    """Train, and return the Trainer's metrics; a signal ends the process here, after a checkpoint.

    Raises:
        RecipeError: the disk filled up, no step was taken, or a loss was no number.
        SystemExit: 128 + signal after Ctrl-C or SIGTERM, as a shell reports them, so that nothing that waits for a
            finished run goes on.
    """
    output_dir = Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        leave_embeddings_apart(trainer.accelerator, trainer.model)
    interruption = Interruption()
    metrics_file = MetricsFileCallback(metrics_path(run, output_dir))
    for callback in (InterruptionCallback(interruption), metrics_file, speed.TrainingClock()):
        trainer.add_callback(callback)
    if uses_ours(trainer):  # --optim_args log_torque=false takes it away again
        trainer.add_callback(TorqueCallback())
    if run.overwrite and not resume_from and trainer.is_world_process_zero():
        remove_earlier_run(output_dir)
    if trainer.is_world_process_zero():
        resuming_runs.record(output_dir, run.given)
        if resume_from:
            print(f"resuming from {resume_from}")
    try:
        with naming_a_full_disk(output_dir):
            metrics = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None).metrics
    finally:
        interruption.restore_handlers()
    if interruption.agreed:
        _leave(interruption.agreed, trainer)
    return metrics | grad_norm_metrics(trainer.state.log_history)


def save_model(trainer: Trainer) -> None:
    """Save the adapter or the whole model to output_dir.

    Communication: under FSDP and ZeRO-3 every process takes part, to bring the pieces together.

    Raises:
        RecipeError: the adapter that was saved is empty.
    """
    if trainer.is_fsdp_enabled:
        # Checkpoints stay in pieces; of the result the Trainer would then write nothing at all.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.is_world_process_zero():
        require_weights(Path(trainer.args.output_dir))


def describe_run(
    trainer: Trainer, sizes: tuple[int, int], *, seconds: float, num_records: int | None = None
) -> dict[str, Any]:
    """Return what was trained, how and by which optimizer; see `reporting.describe_run`.

    Args:
        trainer: after training.
        sizes: numbers of parameters, trained and all.
        seconds: wall time of the run.
        num_records: trained on, where a row of the Trainer's dataset is not one.
    """
    facts = reporting.describe_run(
        trainer.optimizer,
        sizes,
        strategy=describe_strategy(trainer.accelerator),
        num_records=len(trainer.train_dataset) if num_records is None else num_records,
        num_steps=trainer.state.global_step,
        seconds=seconds,
    )
    clock = next((item for item in trainer.callback_handler.callbacks if isinstance(item, speed.TrainingClock)), None)
    measured = {} if clock is None else speed.throughput(trainer.train_dataset, clock.num_epochs, clock.seconds)
    return {**facts, **measured, **speed.peak_memory(trainer.accelerator.device)}


def _leave(number: int, trainer: Trainer) -> None:
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        outcome = checkpoint_written(folder, resumable=not trainer.args.save_only_model)
        announce_stop(number, num_steps=trainer.state.global_step, of=trainer.state.max_steps, outcome=outcome)
    leave_group(trainer.accelerator)
    sys.exit(128 + number)
