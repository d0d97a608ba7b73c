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

import torch
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import causal_demo, completion, generation, models, records, reporting, training
from recipes.support.arguments import DEMO, LoraArguments, ModelArguments, RunArguments, SftDataArguments
from recipes.support.checkpoints import wants_resume
from recipes.support.config import CONFIGS, RecipeParser, parse_recipe_arguments
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.metrics import load_metrics
from recipes.support.output import RESULTS_NAME, check_disk_space

DEMO_CONFIG = CONFIGS / "demo" / "sft-lora.yaml"


def make_parser() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    parser = RecipeParser(
        [RunArguments, ModelArguments, SftDataArguments, LoraArguments, TrainingArguments],
        prog="sft.py",
        description="Fine-tune a causal language model on your records. Without arguments: the embedded demo.",
    )
    parser.set_defaults(
        output_dir="outputs/sft",
        optim="adatamw",
        learning_rate=2e-4,
        warmup_steps=0.05,
        logging_steps=10,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return parser


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    run, model_arguments, data, lora, arguments = parse_recipe_arguments(
        make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG
    )
    resume_from = training.check_run(run, arguments)
    train, validation = load_splits(data, arguments)
    if model_arguments.model_name_or_path == DEMO:
        model_arguments.model_name_or_path = prepare_demo_model(arguments)
    set_seed(arguments.seed)
    tokenizer = models.load_tokenizer(model_arguments)
    model = models.load_model(AutoModelForCausalLM, model_arguments)
    context_length = getattr(model.config, "max_position_embeddings", None)
    encoded_train, encoded_validation = (
        completion.encode_records(split, data, tokenizer, context_length=context_length)
        for split in (train, validation)
    )
    model = models.add_adapter(model, lora, TaskType.CAUSAL_LM)
    check_disk_space(Path(arguments.output_dir), model, full=lora.full)

    # The evaluation before the first step is in the log of the run that is continued.
    arguments.eval_on_start = arguments.eval_on_start and resume_from is None
    trainer = make_trainer(model, tokenizer, arguments, encoded_train, encoded_validation)
    prompts = generation.choose_prompts(encoded_validation, data.num_sample_generations)
    samples = {"prompts": tokenizer.batch_decode(prompts)}
    samples["before"] = generation.complete(trainer.model, tokenizer, prompts)
    metrics = training.train(trainer, run, resume_from=resume_from)
    metrics |= last_evaluation(trainer)
    samples["after"] = generation.complete(trainer.model, tokenizer, prompts)
    with training.naming_a_full_disk(Path(arguments.output_dir)):
        trainer.save_model()
        if trainer.is_world_process_zero():
            report(trainer, metrics, samples, (run, model_arguments, data, lora, arguments), started=started)
    return 0


def load_splits(data: SftDataArguments, arguments: TrainingArguments) -> tuple[records.Records, records.Records]:
    """Load the records to train on and those to evaluate on.

    Raises:
        RecipeError: a file is bad, or there is nothing to evaluate on.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    if data.dataset_name == DEMO:
        announce_demo()
        train, validation = records.select(*causal_demo.demo_records(), data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
    if validation is None:
        raise RecipeError(
            "nothing to evaluate on: give --validation_file, or --validation_fraction above 0 to hold out."
        )
    return train, validation


def prepare_demo_model(arguments: TrainingArguments) -> str:
    """Pretrain the demo model into output_dir/base, on one process of each machine; a resumed run keeps the one there.

    Communication: a barrier, with several processes.
    """
    base = Path(arguments.output_dir) / "base"
    with arguments.main_process_first(local=True, desc="pretraining the demo model"):
        if arguments.local_process_index == 0 and not (wants_resume(arguments) and base.is_dir()):
            causal_demo.build_base(base, show_progress=not arguments.disable_tqdm)
    return str(base)


def make_trainer(
    model: Any, tokenizer: Any, arguments: TrainingArguments, train: Dataset, validation: Dataset
) -> Trainer:
    """Return the Trainer, which reports loss, perplexity and token accuracy at every evaluation."""
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=make_compute_metrics(),
        preprocess_logits_for_metrics=reduce_logits,
    )


def reduce_logits(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits (batch, time, vocabulary) to what the metrics need, so that an evaluation fits into memory.

    Returns:
        For each token but the first: the likeliest id, int64, and the negative log-likelihood of the label in nats,
        fp32; both (batch, time - 1).
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    predicted, targets = logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1).float(), targets.flatten(), ignore_index=completion.IGNORED, reduction="none"
    )
    return predicted.argmax(dim=-1), losses.view(targets.shape)


def make_compute_metrics() -> Any:
    """Return the function that gives the Trainer perplexity and token accuracy."""
    perplexity, token_accuracy = load_metrics("perplexity", "token_accuracy")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        likeliest, losses = prediction.predictions
        targets = prediction.label_ids[:, 1:]
        is_target = targets != completion.IGNORED
        return {
            **perplexity.compute(predictions=losses[is_target], references=targets[is_target]),
            **token_accuracy.compute(predictions=likeliest[is_target], references=targets[is_target]),
        }

    return compute_metrics


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation after the last step, which may have been made already, and the one before the first."""
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    before = {f"{name}_before": value for row in rows[:1] if row["step"] == 0 for name, value in row.items()}
    is_made = bool(rows) and rows[-1]["step"] == trainer.state.global_step
    after = rows[-1] if is_made else trainer.evaluate()
    kept = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
    return {name: value for name, value in {**before, **after}.items() if name.removesuffix("_before") in kept}


def report(
    trainer: Trainer, metrics: dict[str, float], samples: dict[str, Any], arguments: tuple[Any, ...], *, started: float
) -> None:
    """Write results.json, and print the samples and the table."""
    for number, (before, after) in enumerate(zip(samples["before"], samples["after"], strict=True)):
        print(f"\nprompt  {samples['prompts'][number]}\nbefore  {before}\nafter   {after}")
    facts = reporting.describe_run(trainer, seconds=time.perf_counter() - started)
    output_dir = Path(trainer.args.output_dir)
    reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics, "samples": samples}, arguments)
    shown = {name: value for name, value in metrics.items() if name.startswith("eval") or name == "train_loss"}
    reporting.print_table(f"sft: {output_dir}", {**facts, **shown})


def announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a small Llama that has read about animals learns to answer questions about them.\n"
        "For real work pass a model and your records (messages, prompt and completion, or text), for example\n"
        "  --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file train.jsonl"
    )


if __name__ == "__main__":
    sys.exit(main())
