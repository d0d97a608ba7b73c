"""Fine-tune an encoder for text classification, with a LoRA adapter or in full.

    python recipes/classify.py
    python recipes/classify.py --config recipes/configs/minilm/classify.yaml --model_name_or_path FOLDER
        --train_file train.csv --test_file test.csv --label_column category

The first line is the demo: a tiny encoder on embedded questions to a library's help desk, offline, in seconds.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import adapters, classification, encoder_demo, models, parallel, records, reporting, training
from recipes.support.arguments import DEMO, ClassifyDataArguments, LoraArguments, ModelArguments, RunArguments
from recipes.support.config import CONFIGS, RecipeParser, parse_recipe_arguments, precision_of_the_launch
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.label_metrics import make_compute_metrics
from recipes.support.output import RESULTS_NAME, check_disk_space, naming_a_full_disk

DEMO_CONFIG = CONFIGS / "demo" / "classify.yaml"


def make_parser() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    parser = RecipeParser(
        [RunArguments, ModelArguments, ClassifyDataArguments, LoraArguments, TrainingArguments],
        prog="classify.py",
        description="Fine-tune an encoder for text classification. Without arguments: the embedded demo.",
    )
    parser.set_defaults(
        output_dir="outputs/classify",
        optim="adatamw",
        learning_rate=1e-3,
        warmup_steps=0.1,
        logging_steps=10,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        **precision_of_the_launch(),
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
    splits = load_splits(data, arguments)
    names = classification.label_names(splits["train"], data)
    set_seed(arguments.seed)
    tokenizer, model = load_encoder(model_arguments, lora, names)
    encoded = encode_splits(splits, data, tokenizer, names)
    output_dir = Path(arguments.output_dir)
    check_disk_space(output_dir, model, full=lora.full)
    sizes = models.count_parameters(model)

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(),
    )
    adapters.use_loraplus(trainer, lora)
    metrics = training.train(trainer, run, resume_from=resume_from)
    metrics |= training.evaluate(trainer, encoded, lambda name: classification.most_frequent_share(encoded[name]))
    with naming_a_full_disk(output_dir):
        training.save_model(trainer)
        if trainer.is_world_process_zero():
            report(trainer, sizes, metrics, (run, model_arguments, data, lora, arguments), started=started)
    parallel.leave_group(trainer.accelerator)
    return 0


def load_splits(data: ClassifyDataArguments, arguments: TrainingArguments) -> dict[str, records.Records]:
    """Load and check the splits there are: train, and of validation and test those that were named.

    Raises:
        RecipeError: a file, a column or a record is bad, or there is nothing to evaluate on.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    if data.dataset_name == DEMO:
        announce_demo()
        train, validation, test = encoder_demo.demo_records()
        train, validation = records.select(train, validation, data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
        if validation is not None and not data.validation_file:
            validation, num_left_out = classification.without_new_labels(validation, train, data)
            if num_left_out:
                reporting.warn(f"{num_left_out} records held out have a label that no training record has: left out")
        test = records.load_file(data.test_file) if data.test_file else None
    splits = {"train": train, "validation": validation, "test": test}
    present = {name: split for name, split in splits.items() if split is not None}
    for split in present.values():
        classification.check_records(split, data)
    if arguments.eval_strategy != "no" and validation is None:
        raise RecipeError(
            "eval_strategy needs data: give --validation_file, or --validation_fraction 0.1 to hold out."
        )
    if len(present) == 1:
        raise RecipeError("nothing to measure on: give --test_file, --validation_file or --validation_fraction.")
    return present


def load_encoder(model_arguments: ModelArguments, lora: LoraArguments, names: list[str]) -> tuple[Any, Any]:
    """Return the tokenizer and the model, with its adapter unless training is full.

    Raises:
        RecipeError: the model cannot be loaded, or an adapter was asked for on the untrained demo encoder.
    """
    if model_arguments.model_name_or_path == DEMO:
        if not lora.full:
            raise RecipeError("the demo encoder starts from random weights, which an adapter cannot mend: add --full.")
        train, _, _ = encoder_demo.demo_records()
        tokenizer = encoder_demo.build_tokenizer(list(train.dataset["text"]))
        return tokenizer, encoder_demo.build_encoder(tokenizer, names)
    tokenizer, config = models.load_tokenizer(model_arguments), models.load_config(model_arguments)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.pad_token_id = tokenizer.pad_token_id
    model = models.load_model(
        AutoModelForSequenceClassification, model_arguments, config=config, new_head=True, lora=lora
    )
    return tokenizer, models.add_adapter(model, lora, TaskType.SEQ_CLS)


def encode_splits(
    splits: dict[str, records.Records], data: ClassifyDataArguments, tokenizer: Any, names: list[str]
) -> dict[str, Any]:
    """Tokenise every split, and warn with a count where texts were cut."""
    encoded = {}
    for name, split in splits.items():
        encoded[name], num_cut = classification.encode_records(split, data, tokenizer, names)
        if num_cut:
            reporting.warn(
                f"{num_cut} of {len(encoded[name])} texts of {split.source} were cut to {data.max_length} tokens"
            )
    return encoded


def report(
    trainer: Trainer, sizes: tuple[int, int], metrics: dict[str, float], arguments: tuple[Any, ...], *, started: float
) -> None:
    """Write results.json and print the table."""
    facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
    output_dir = Path(trainer.args.output_dir)
    reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics}, arguments)
    shown = {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}
    reporting.print_table(f"classify: {output_dir}", {**facts, **shown})


def announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a tiny encoder learns what visitors of a library ask. For real work pass, for example,\n"
        "  --model_name_or_path MODEL --train_file train.csv --test_file test.csv --text_column A --label_column B"
    )


if __name__ == "__main__":
    sys.exit(main())
