"""Teach a causal language model preferences by DPO, with a LoRA adapter or in full.

    python recipes/dpo.py
    python recipes/dpo.py --model_name_or_path FOLDER_OR_NAME --train_file train.jsonl --beta 0.1
    python recipes/dpo.py --model_name_or_path FOLDER_OR_NAME --dataset_name NAME --full --learning_rate 1e-6

The first line is the demo: a small Llama, pretrained on the spot, learns to prefer answers that are to the point. The
trainer is TRL's; of its arguments, all but `model_init_kwargs` have their meaning.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapters,
    generation,
    models,
    parallel,
    parsers,
    preference_metrics,
    preferences,
    sft_data,
    sft_report,
    training,
)
from recipes.support.arguments import DEMO, LoraArguments, ModelArguments
from recipes.support.checkpoints import wants_resume
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import exit_with_one_line
from recipes.support.output import check_disk_space, naming_a_full_disk
from recipes.support.reporting import warn

make_parser, DEMO_CONFIG = parsers.dpo, parsers.DEMO_CONFIGS["dpo"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    run, model_arguments, data, lora, arguments = parse_recipe_arguments(
        make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG
    )
    resume_from = training.check_run(run, arguments)
    output_dir = Path(arguments.output_dir)
    splits = preferences.load_splits(data, seed=arguments.seed if arguments.data_seed is None else arguments.data_seed)
    if model_arguments.model_name_or_path == DEMO:
        model_arguments.model_name_or_path = sft_data.prepare_demo_model(
            output_dir, keep=wants_resume(arguments.resume_from_checkpoint), show_progress=not arguments.disable_tqdm
        )
    set_seed(arguments.seed)
    tokenizer = models.load_tokenizer(model_arguments)
    model = models.load_model(AutoModelForCausalLM, model_arguments, lora=lora)
    arguments.max_length = longest_pair(arguments, model)
    train, validation = (preferences.prepare(split, data, tokenizer, limit=arguments.max_length) for split in splits)
    model = models.add_adapter(model, lora, TaskType.CAUSAL_LM)
    sizes = models.count_parameters(model)
    check_disk_space(output_dir, model, full=lora.full)

    # The evaluation before the first step is in the log of the run that is continued.
    arguments.eval_on_start = arguments.eval_on_start and resume_from is None
    trainer = make_trainer(model, tokenizer, model_arguments, lora, arguments, train, validation)
    num_prompts = parallel.num_sample_generations(trainer.accelerator, data.num_sample_generations)
    prompts = preferences.choose_prompts(validation, tokenizer, num_prompts)
    samples = {"prompts": [tokenizer.decode(prompt) for prompt in prompts]}
    samples["before"] = generation.complete(trainer.model, tokenizer, prompts)
    before = preference_metrics.preference_accuracy(trainer)
    metrics = training.train(trainer, run, resume_from=resume_from)
    metrics |= last_evaluation(trainer, preferred_before=before)
    samples["after"] = generation.complete(trainer.model, tokenizer, prompts)
    with naming_a_full_disk(output_dir):
        training.save_model(trainer)
        if trainer.is_world_process_zero():
            facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
            groups = (run, model_arguments, data, lora, arguments)
            sft_report.report("dpo", output_dir, facts, metrics, samples, groups)
    parallel.leave_group(trainer.accelerator)
    return 0


def longest_pair(arguments: DPOConfig, model: Any) -> int:
    """Return how many tokens a prompt with its completion may have: `max_length`, or the context if shorter."""
    context_length = getattr(model.config, "max_position_embeddings", None)
    limits = [limit for limit in (arguments.max_length, context_length) if limit is not None]
    return min(limits) if limits else sys.maxsize


def make_trainer(
    model: Any,
    tokenizer: Any,
    model_arguments: ModelArguments,
    lora: LoraArguments,
    arguments: DPOConfig,
    train: Dataset,
    validation: Dataset,
) -> DPOTrainer:
    """Return TRL's trainer; the reference is the model without its adapter, or for full training a second copy."""
    if lora.lora_dropout and arguments.disable_dropout:
        warn("lora_dropout has no effect: DPO compares without dropout (--disable_dropout false keeps it)")
    needs_copy = lora.full and not arguments.precompute_ref_log_probs
    trainer = DPOTrainer(
        model=model,
        ref_model=models.load_model(AutoModelForCausalLM, model_arguments) if needs_copy else None,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    if not lora.full:
        # TRL takes an adapter that it is given for a trained one, and copies it as the reference (1.16). A new one
        # changes nothing: the model with its adapter switched off is the same, at no cost.
        trainer.model.delete_adapter("ref")
    adapters.use_loraplus(trainer, lora)
    return trainer


def last_evaluation(trainer: DPOTrainer, *, preferred_before: float) -> dict[str, float]:
    """Return loss, rewards and preferences after the last step, and before the first."""
    history = trainer.state.log_history
    if not any("eval_loss" in row and row["step"] == trainer.state.global_step for row in history):
        trainer.evaluate()
    return {
        **preference_metrics.first_and_last(history),
        "eval_preference_accuracy_before": preferred_before,
        "eval_preference_accuracy": preference_metrics.preference_accuracy(trainer),
    }


if __name__ == "__main__":
    sys.exit(main())
