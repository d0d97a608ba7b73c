"""Fine-tune a causal language model with a LoRA adapter, in a loop written by hand with accelerate.

    python recipes/no_trainer.py
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/no_trainer.py --model_name_or_path
        FOLDER_OR_NAME --train_file train.jsonl

The same task, data and demo as sft.py, for those who do without the Trainer: copy what you need.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from peft import TaskType
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import DataCollator, get_scheduler, set_seed

from hf_tam import AdaTAMW
from recipes.support import (
    adapters,
    generation,
    models,
    packing,
    parallel,
    parsers,
    reporting,
    sft_data,
    sft_model,
    sft_report,
    speed,
    state_checkpoints,
)
from recipes.support.arguments import (
    DEMO,
    LoopArguments,
    LoraArguments,
    RunArguments,
    SftModelArguments,
)
from recipes.support.causal_metrics import reduce_logits, token_losses
from recipes.support.checkpoints import choose_checkpoint, wants_resume
from recipes.support.completion import IGNORED
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.interruption import Interruption, announce_stop, checkpoint_written
from recipes.support.loop_log import LoopLog
from recipes.support.output import (
    check_disk_space,
    check_output_directory,
    metrics_path,
    naming_a_full_disk,
    remove_earlier_run,
)

make_parser, DEMO_CONFIG = parsers.no_trainer, parsers.DEMO_CONFIGS["no_trainer"]


@dataclass
class Job:
    """What a step needs: the objects that accelerate prepared, and the log, which knows the plan."""

    accelerator: Accelerator
    arguments: LoopArguments
    model: Any
    optimizer: Any
    scheduler: Any
    train_loader: Any
    eval_loader: Any
    log: LoopLog


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = parse_recipe_arguments(make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG)
    run, model_arguments, data, lora, arguments = groups
    accelerator = make_accelerator(model_arguments, arguments)
    output_dir = Path(arguments.output_dir)
    resume_from = check_run(accelerator, run, arguments)
    splits = sft_data.load_splits(data, seed=arguments.seed)
    if model_arguments.model_name_or_path == DEMO:
        model_arguments.model_name_or_path = sft_data.prepare_demo_model(
            output_dir, keep=wants_resume(arguments.resume_from_checkpoint), show_progress=not arguments.disable_tqdm
        )
    set_seed(arguments.seed)
    tokenizer, model = sft_model.load(model_arguments, lora, saves_state=arguments.save_strategy != "no")
    train_data, validation = sft_data.encode_splits(splits, data, tokenizer, model.config)
    model = models.add_adapter(model, lora, TaskType.CAUSAL_LM)
    sizes = models.count_parameters(model)
    check_disk_space(output_dir, model, full=lora.full)

    log = LoopLog(accelerator, metrics_path(run, output_dir), every=arguments.logging_steps)
    batches, collate = sft_data.make_batches((train_data, validation), data, tokenizer)
    job = prepare(accelerator, arguments, model, lora, collate, batches, log)
    if data.packing:
        packing.require_separation(job.model, model.config)
    num_prompts = parallel.num_sample_generations(accelerator, data.num_sample_generations)
    prompts = generation.choose_prompts(validation, num_prompts)
    samples = {"prompts": [tokenizer.decode(prompt) for prompt in prompts]}
    samples["before"] = generation.complete(accelerator.unwrap_model(job.model), tokenizer, prompts)
    if accelerator.is_main_process and run.overwrite and resume_from is None:
        remove_earlier_run(output_dir)
    with naming_a_full_disk(output_dir, state_checkpoints.newest):
        train(job, resume_from)
        samples["after"] = generation.complete(accelerator.unwrap_model(job.model), tokenizer, prompts)
        save_model(job, tokenizer)
        if accelerator.is_main_process:
            facts = reporting.describe_run(
                job.optimizer,
                sizes,
                strategy=parallel.describe_strategy(accelerator),
                num_records=len(train_data),
                num_steps=log.num_steps,
                seconds=time.perf_counter() - started,
            )
            facts |= speed.throughput(train_data, log.num_noted / log.steps_per_epoch, log.seconds)
            facts |= speed.peak_memory(accelerator.device)
            sft_report.report("no_trainer", output_dir, facts, log.summarise(), samples, groups)
    accelerator.end_training()
    return 0


def make_accelerator(model_arguments: SftModelArguments, arguments: LoopArguments) -> Accelerator:
    """Return the Accelerator; how the processes share the work is said by `accelerate launch --config_file`.

    Raises:
        RecipeError: the configuration, or `--tp_size`, does not fit the processes.
    """
    tp_size = model_arguments.tp_size
    try:
        return Accelerator(
            cpu=arguments.use_cpu,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            # The schedule is stepped once a step, however many processes there are.
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
            # Without one, accelerate takes what the launch says.
            parallelism_config=None if tp_size is None else ParallelismConfig(tp_size=tp_size),
        )
    except ValueError as error:
        raise RecipeError(f"accelerate cannot start: {' '.join(str(error).split())}") from error


def check_run(accelerator: Accelerator, run: RunArguments, arguments: LoopArguments) -> Path | None:
    """Check output directory and checkpoint before anything slow is done; return the checkpoint to resume from.

    Communication: a barrier, with several processes.

    Raises:
        RecipeError: the run cannot start, and why.
    """
    output_dir, choice = Path(arguments.output_dir), arguments.resume_from_checkpoint
    check_output_directory(output_dir, overwrite=run.overwrite, resuming=wants_resume(choice))
    folder = choose_checkpoint(choice, output_dir, state_checkpoints.newest)
    if folder is not None:
        state_checkpoints.require_resumable(accelerator, folder)
    return folder


def prepare(
    accelerator: Accelerator,
    arguments: LoopArguments,
    model: Any,
    lora: LoraArguments,
    collate: DataCollator,
    data: tuple[Dataset, Dataset],
    log: LoopLog,
) -> Job:
    """Build loaders, optimizer and schedule, and have accelerate prepare everything."""
    train_loader, eval_loader = accelerator.prepare(*make_loaders(arguments, collate, *data))
    steps_per_epoch = math.ceil(len(train_loader) / arguments.gradient_accumulation_steps)
    num_steps = math.ceil(arguments.num_train_epochs * steps_per_epoch)
    if arguments.max_steps > 0:
        num_steps = arguments.max_steps
    optimizer = AdaTAMW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        gamma=arguments.gamma,
        scope=arguments.scope,
    )
    if lora.loraplus_lr_ratio is not None:
        adapters.set_learning_rates(
            optimizer, adapters.matrices_b(model), lambda learning_rate: learning_rate * lora.loraplus_lr_ratio
        )
    warmup = arguments.warmup_steps
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(warmup * num_steps) if warmup < 1 else int(warmup),
        num_training_steps=num_steps,
    )
    model.config.use_cache = False  # of no use here, and activation checkpointing would fill it twice
    parallel.configure_plugins(accelerator, model, arguments)
    parallel.keep_all_copies(accelerator)
    # FSDP2 and DeepSpeed must see the model and its optimizer in one call.
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    state_checkpoints.leave_out_frozen_weights(accelerator)
    log.plan(optimizer, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    return Job(accelerator, arguments, model, optimizer, scheduler, train_loader, eval_loader, log)


def make_loaders(
    arguments: LoopArguments, collate: DataCollator, train_data: Dataset, validation: Dataset
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the loaders of the training data, shuffled, and of the validation data.

    Each has a generator of its own: the start of an epoch must not draw from the one that dropout uses, or a resumed
    run would go on with other numbers.
    """
    return (
        DataLoader(
            train_data,
            batch_size=arguments.per_device_train_batch_size,
            shuffle=True,
            collate_fn=collate,
            generator=torch.Generator(),
        ),
        DataLoader(
            validation,
            batch_size=arguments.per_device_eval_batch_size,
            collate_fn=collate,
            generator=torch.Generator(),
        ),
    )


def train(job: Job, resume_from: Path | None) -> None:
    """Train to the last step, saving and evaluating on the way; a signal ends the process here, after a checkpoint.

    Raises:
        SystemExit: 128 + signal after Ctrl-C or SIGTERM.
    """
    step = 0 if resume_from is None else state_checkpoints.load(job.accelerator, resume_from)
    job.log.begin(step)
    if step == 0 and job.arguments.eval_strategy != "no":
        job.log.write(step, evaluate(job))
    interruption = Interruption()
    interruption.take_over_signals()
    try:
        while step < job.log.num_steps and not interruption.agreed:
            step = train_epoch(job, step, interruption)
    finally:
        interruption.restore_handlers()
    if interruption.agreed:
        leave(job, step, interruption.agreed)
    if job.arguments.save_strategy != "no":
        save_state(job, step)
    job.log.write(step, evaluate(job))


def train_epoch(job: Job, step: int, interruption: Interruption) -> int:
    """Train from `step` to the end of its epoch, or to the last step, or until a signal came.

    Returns:
        The step reached.
    """
    arguments, epoch = job.arguments, step // job.log.steps_per_epoch
    for window in windows(job, epoch, skip=step % job.log.steps_per_epoch):
        learning_rate, *_ = job.scheduler.get_last_lr()
        started = time.perf_counter()
        loss, grad_norm = train_step(job, window)
        seconds = time.perf_counter() - started
        step += 1
        job.log.note_step(step, loss, grad_norm=grad_norm, learning_rate=learning_rate, seconds=seconds)
        if interruption.agree(job.accelerator.device) or step == job.log.num_steps:
            break
        if job.log.is_due(step, arguments.eval_strategy, arguments.eval_steps):
            job.log.write(step, evaluate(job))
        if job.log.is_due(step, arguments.save_strategy, arguments.save_steps):
            save_state(job, step)
    return step


def windows(job: Job, epoch: int, *, skip: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield the batches of each step of an epoch together, leaving out those of the first `skip` steps."""
    size, loader = job.arguments.gradient_accumulation_steps, job.train_loader
    loader.set_epoch(epoch)
    if skip:
        loader = job.accelerator.skip_first_batches(loader, skip * size)
        loader.set_epoch(epoch)  # accelerate 1.12 would begin with the first epoch's order
    batches = iter(loader)
    while window := list(islice(batches, size)):
        yield window


def train_step(job: Job, window: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float | None]:
    """Take one optimizer step on the mean loss over all targets of `window`.

    Every target counts the same, whichever batch and process it is in: losses are summed and divided by the number of
    targets of the whole step. accelerate and the wrapper average over batches and processes, which is undone.

    Communication: one gather of a number, and what the strategy does with gradients.

    Returns:
        What this process contributes to the mean loss, and the norm of the gradients before clipping, if measured.
    """
    accelerator = job.accelerator
    num_replicas = accelerator.num_processes // parallel.num_copies(accelerator)
    num_targets = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in window)
    num_targets = parallel.sum_of_replicas(accelerator, num_targets)
    total = torch.zeros((), device=accelerator.device)
    for position, batch in enumerate(window, start=1):
        accelerator.sync_gradients = position == len(window)
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(job.model):
            labels = batch.pop("labels")
            loss = token_losses(job.model(**batch).logits, labels).sum() / num_targets
            accelerator.backward(loss * num_replicas * job.arguments.gradient_accumulation_steps)
        total += loss.detach()
    grad_norm = clip_gradients(job)
    job.optimizer.step()
    job.scheduler.step()
    job.optimizer.zero_grad()
    return total, grad_norm


def clip_gradients(job: Job) -> float | None:
    """Clip the gradients to `max_grad_norm` and return their norm before; with 0, leave them and measure nothing.

    Communication: where the model is in pieces, their norms are brought together.
    """
    if job.arguments.max_grad_norm == 0:
        return None
    # DeepSpeed has clipped, and stepped, at the end of the last backward pass: it only tells the norm.
    norm = job.accelerator.clip_grad_norm_(job.model.parameters(), job.arguments.max_grad_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def evaluate(job: Job) -> dict[str, float]:
    """Return loss, perplexity and token accuracy over all targets of the validation data.

    Communication: three numbers a record are gathered.
    """
    job.model.eval()
    rows = []
    for batch in job.eval_loader:
        labels = batch.pop("labels")
        with torch.no_grad():
            likeliest, losses = reduce_logits(job.model(**batch).logits, labels)
        targets = labels[:, 1:]
        is_target = targets != IGNORED
        correct = (likeliest == targets) & is_target
        sums = torch.stack([losses.sum(1), correct.sum(1), is_target.sum(1)], dim=1)
        rows.append(job.accelerator.gather_for_metrics(sums))
    job.model.train()
    loss, num_correct, num_targets = torch.cat(rows).cpu().double().sum(0).tolist()
    mean = loss / num_targets
    return {"eval_loss": mean, "eval_perplexity": math.exp(mean), "eval_token_accuracy": num_correct / num_targets}


def save_state(job: Job, step: int) -> Path:
    """Save everything that resuming needs; see `state_checkpoints.save`."""
    return state_checkpoints.save(
        job.accelerator, Path(job.arguments.output_dir), step=step, keep=job.arguments.save_total_limit
    )


def save_model(job: Job, tokenizer: Any) -> None:
    """Save the adapter, or with --full the model, and the tokenizer to output_dir.

    Communication: where the model is in pieces, they are brought together on the main process.

    Raises:
        RecipeError: the adapter that was saved is empty.
    """
    accelerator = job.accelerator
    cut = parallel.is_tensor_parallel(accelerator)
    # transformers brings together itself what it has cut itself.
    state = None if cut else accelerator.get_state_dict(job.model)
    if accelerator.is_main_process or cut:
        model = accelerator.unwrap_model(job.model)
        model.save_pretrained(job.arguments.output_dir, state_dict=state, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(job.arguments.output_dir)
        models.require_weights(Path(job.arguments.output_dir))


def leave(job: Job, step: int, number: int) -> NoReturn:
    """Save the state and end the process, as a signal asked for.

    Raises:
        SystemExit: always, with 128 + `number`.
    """
    outcome = "nothing was saved: under tensor parallelism the optimizer cannot be"
    if not parallel.is_tensor_parallel(job.accelerator):
        outcome = checkpoint_written(save_state(job, step))
    if job.accelerator.is_main_process:
        announce_stop(number, num_steps=step, of=job.log.num_steps, outcome=outcome)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
