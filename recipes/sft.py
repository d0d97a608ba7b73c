"""Fine-tune a causal language model on your records, with a LoRA adapter or in full.

    python recipes/sft.py
    python recipes/sft.py --config recipes/configs/smollm2-135m/lora.yaml --train_file train.jsonl
    python recipes/sft.py --model_name_or_path FOLDER_OR_NAME --dataset_name NAME --optim adamw_torch

The first line is the demo: a small Llama, pretrained on the spot, learns to answer questions, offline, in two minutes.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset
from peft import TaskType
from transformers import Trainer, set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapters,
    causal_metrics,
    dry_run,
    early_stopping,
    generation,
    hub,
    merging,
    models,
    packing,
    parallel,
    parsers,
    sft_data,
    sft_model,
    sft_report,
    training,
)
from recipes.support.arguments import DEMO
from recipes.support.checkpoints import wants_resume
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import exit_with_one_line
from recipes.support.output import check_disk_space, naming_a_full_disk

make_parser, DEMO_CONFIG = parsers.sft, parsers.DEMO_CONFIGS["sft"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    demo_config = None if merging.names_finished_run(argv) else DEMO_CONFIG
    groups = parse_recipe_arguments(make_parser(), argv, demo_config=demo_config)
    run, model_arguments, data, lora, arguments = groups
    output_dir = Path(arguments.output_dir)
    if run.dry_run:
        return dry_run.report(groups)
    if merging.is_all_to_do(run, lora, arguments):
        return merging.merge(output_dir)
    early_stopping.check_early_stopping(run, arguments)
    resume_from = training.check_run(run, arguments)
    splits = sft_data.load_splits(data, seed=arguments.seed if arguments.data_seed is None else arguments.data_seed)
    if model_arguments.model_name_or_path == DEMO:
        model_arguments.model_name_or_path = sft_data.prepare_demo_model(
            output_dir, keep=wants_resume(arguments.resume_from_checkpoint), show_progress=not arguments.disable_tqdm
        )
    set_seed(arguments.seed)
    saves_state = arguments.save_strategy != "no" and not arguments.save_only_model
    tokenizer, model = sft_model.load(model_arguments, lora, saves_state=saves_state)
    train, validation = sft_data.encode_splits(splits, data, tokenizer, model.config)
    test = None if run.test_file is None else sft_data.encode_test(run.test_file, data, tokenizer, model.config)
    model = models.add_adapter(model, lora, TaskType.CAUSAL_LM)
    sizes = models.count_parameters(model)
    check_disk_space(output_dir, model, full=lora.full)

    # The evaluation before the first step is in the log of the run that is continued.
    arguments.eval_on_start = arguments.eval_on_start and resume_from is None
    trainer = make_trainer(model, tokenizer, groups, (train, validation))
    num_prompts = parallel.num_sample_generations(trainer.accelerator, data.num_sample_generations)
    prompts = generation.choose_prompts(validation, num_prompts)
    samples = {"prompts": [tokenizer.decode(prompt) for prompt in prompts]}
    samples["before"] = generation.complete(trainer.model, tokenizer, prompts)
    metrics = training.train(trainer, run, resume_from=resume_from)
    metrics |= last_evaluation(trainer)
    if test is not None:
        metrics |= _without_timing(trainer.evaluate(test, metric_key_prefix="test"))
    samples["after"] = generation.complete(trainer.model, tokenizer, prompts)
    facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started, num_records=len(train))
    with naming_a_full_disk(output_dir):
        save(trainer, facts, metrics, groups, source=splits[0].source)
        if trainer.is_world_process_zero():
            sft_report.report("sft", output_dir, facts, metrics, samples, groups)
    is_main = trainer.is_world_process_zero()
    parallel.leave_group(trainer.accelerator)
    return merging.merge(output_dir) if run.merge and is_main else 0


def make_trainer(model: Any, tokenizer: Any, groups: tuple[Any, ...], splits: tuple[Dataset, Dataset]) -> Trainer:
    """Return the Trainer, which reports loss, perplexity and token accuracy at every evaluation."""
    run, _, data, lora, arguments = groups
    (train, validation), collator = sft_data.make_batches(splits, data, tokenizer)
    with hub.naming_the_hub(arguments, remedy="log in by `hf auth login`, or drop push_to_hub"):
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=causal_metrics.make_compute_metrics(),
            preprocess_logits_for_metrics=causal_metrics.reduce_logits,
        )
    parallel.keep_all_copies(trainer.accelerator)
    trainer.gather_function = trainer.accelerator.gather_for_metrics
    if parallel.is_tensor_parallel(trainer.accelerator):
        # A signal still writes a checkpoint; the Trainer cannot put the optimizer into it.
        trainer.args.save_only_model = True
    adapters.use_loraplus(trainer, lora)
    early_stopping.use_early_stopping(trainer, run)
    if data.packing:
        if parallel.is_whole(trainer.accelerator):
            packing.require_separation(model, model.config)
        else:
            trainer.add_callback(packing.SeparationCheck())
    return trainer


def save(
    trainer: Trainer, facts: dict[str, Any], metrics: dict[str, float], groups: tuple[Any, ...], *, source: str
) -> None:
    """Save the result with its model card, and push it if asked to.

    Communication: under FSDP and ZeRO-3 every process takes part, to bring the pieces together.

    Raises:
        RecipeError: the adapter that was saved is empty, or the hub does not take it.
    """
    output_dir = Path(trainer.args.output_dir)

    def write_card() -> None:
        hub.write_model_card(output_dir, facts, metrics, groups, source=source)

    hub.use_model_card(trainer, write_card)
    with hub.naming_the_hub(trainer.args, remedy=f"the result is in {output_dir}; `hf upload` takes a folder"):
        training.save_model(trainer)
    if trainer.is_world_process_zero():
        write_card()  # peft has written one beside the adapter


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation of the result, which may have been made already, and the one before the first step."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    before = {f"{name}_before": value for row in rows[:1] if row["step"] == 0 for name, value in row.items()}
    went_back = trainer.args.load_best_model_at_end and trainer.state.best_global_step != trainer.state.global_step
    is_made = bool(rows) and rows[-1]["step"] == trainer.state.global_step and not went_back
    after = rows[-1] if is_made else trainer.evaluate()
    return _without_timing({**before, **after})


def _without_timing(metrics: dict[str, float]) -> dict[str, float]:
    kept = ("loss", "perplexity", "token_accuracy")
    return {name: value for name, value in metrics.items() if name.partition("_")[2].removesuffix("_before") in kept}


if __name__ == "__main__":
    sys.exit(main())
