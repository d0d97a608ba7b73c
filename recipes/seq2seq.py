"""Fine-tune a T5-style model on sources and targets (summaries, translations), with a LoRA adapter or in full.

    python recipes/seq2seq.py
    python recipes/seq2seq.py --config recipes/configs/flan-t5-base/lora.yaml --train_file train.jsonl
        --test_file test.jsonl --source_column article --target_column summary --source_prefix "summarize: "

The first line is the demo: a tiny T5 learns to read dates, offline, in a minute.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: F401  quiets bitsandbytes, which transformers imports by way of peft

# isort: split
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapters,
    models,
    outcome,
    parallel,
    parsers,
    seq2seq_data,
    seq2seq_demo,
    sft_report,
    text_metrics,
    training,
)
from recipes.support.arguments import DEMO, ModelArguments
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.output import check_disk_space, naming_a_full_disk
from recipes.support.target_loss import TargetSeq2SeqTrainer
from recipes.support.task_arguments import Seq2SeqDataArguments

make_parser, DEMO_CONFIG = parsers.seq2seq, parsers.DEMO_CONFIGS["seq2seq"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    run, model_arguments, data, arguments = parse_recipe_arguments(
        make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG
    )
    resume_from = training.check_run(run, model_arguments, data, arguments)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    splits = seq2seq_data.load_splits(data, seed=seed, evaluates=arguments.eval_strategy != "no")
    set_seed(arguments.seed)
    tokenizer, model = load_model(model_arguments)
    context_length = getattr(model.config, "max_position_embeddings", None)
    encoded = {
        name: seq2seq_data.encode(split, data, tokenizer, context_length=context_length)
        for name, split in splits.items()
    }
    output_dir = Path(arguments.output_dir)
    check_disk_space(output_dir, model, full=not model_arguments.use_peft)
    sizes = models.count_parameters(model)

    arguments.generation_max_length = arguments.generation_max_length or data.max_target_length + 1
    arguments.generation_num_beams = arguments.generation_num_beams or data.num_beams
    trainer = make_trainer(model, tokenizer, arguments, data, encoded)
    adapters.use_loraplus(trainer, model_arguments)
    shown = text_metrics.evenly(encoded.get("test") or encoded["validation"], data.num_sample_generations)
    samples = {"prompts": text_metrics.decode(shown["input_ids"], tokenizer)}
    trainer.add_callback(WritingFirst(trainer, shown, samples))
    metrics = training.train(trainer, run, resume_from=resume_from)
    outcome.require_learning(trainer)
    for split, prefix in (("validation", "eval"), ("test", "test")):
        # where there is test data, validation data has been measured during training
        if split in encoded and (split == "test" or "test" not in encoded or arguments.eval_strategy == "no"):
            metrics |= text_metrics.without_timing(trainer.evaluate(encoded[split], metric_key_prefix=prefix))
    outcome.require_numbers(metrics)
    samples["after"] = write(trainer, shown)
    with naming_a_full_disk(output_dir):
        training.save_model(trainer)
        if trainer.is_world_process_zero():
            facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
            groups = (run, model_arguments, data, arguments)
            sft_report.report("seq2seq", output_dir, facts, metrics, samples, groups)
    parallel.leave_group(trainer.accelerator)
    return 0


def load_model(model_arguments: ModelArguments) -> tuple[Any, Any]:
    """Return the tokenizer and the model, with its adapter unless training is full.

    Raises:
        RecipeError: the model cannot be loaded, or an adapter was asked for on the untrained demo model.
    """
    if model_arguments.model_name_or_path == DEMO:
        if model_arguments.use_peft:
            raise RecipeError(
                "the demo model starts from random weights, which an adapter cannot mend: drop --use_peft."
            )
        train, _, _ = seq2seq_demo.demo_records()
        tokenizer = seq2seq_demo.build_tokenizer([*train.dataset["source"], *train.dataset["target"]])
        return tokenizer, seq2seq_demo.build_model(tokenizer)
    tokenizer = models.load_tokenizer(model_arguments)
    model = models.load_model(AutoModelForSeq2SeqLM, model_arguments)
    return tokenizer, models.add_adapter(model, model_arguments, TaskType.SEQ_2_SEQ_LM)


def make_trainer(
    model: Any,
    tokenizer: Any,
    arguments: Seq2SeqTrainingArguments,
    data: Seq2SeqDataArguments,
    encoded: dict[str, Dataset],
) -> Seq2SeqTrainer:
    """Return the Trainer, which measures what the model writes at every evaluation."""
    generates = arguments.predict_with_generate
    return TargetSeq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=text_metrics.make_compute_metrics(tokenizer, data.text_metrics) if generates else None,
    )


class WritingFirst(TrainerCallback):
    """Writes before the first step, and not before training.

    A model that is evaluated before accelerate has prepared it for training is not wrapped any more (1.15): of several
    processes, each would train alone, on gradients of its own.
    """

    def __init__(self, trainer: Seq2SeqTrainer, shown: Dataset, samples: dict[str, list[str]]) -> None:
        """Do nothing yet.

        Args:
            trainer: the Trainer.
            shown: the records to write for.
            samples: gets what is written, as `before`.
        """
        self._trainer, self._shown, self._samples = trainer, shown, samples

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Write."""
        self._samples["before"] = write(self._trainer, self._shown)


def write(trainer: Seq2SeqTrainer, shown: Dataset) -> list[str]:
    """Return what the model writes for the records of `shown`."""
    if not len(shown) or not trainer.args.predict_with_generate:
        return [""] * len(shown)
    measure, trainer.compute_metrics = trainer.compute_metrics, None
    written = text_metrics.decode(trainer.predict(shown).predictions, trainer.processing_class)
    trainer.compute_metrics = measure
    return written


if __name__ == "__main__":
    sys.exit(main())
