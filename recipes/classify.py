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

from transformers import (
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import adapters, classification, encoder_task, models, parallel, parsers, reporting, training
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import exit_with_one_line
from recipes.support.label_metrics import make_compute_metrics
from recipes.support.output import RESULTS_NAME, check_disk_space, naming_a_full_disk
from recipes.support.target_loss import TargetTrainer

make_parser, DEMO_CONFIG = parsers.classify, parsers.DEMO_CONFIGS["classify"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    run, model_arguments, data, lora, arguments = parse_recipe_arguments(
        make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG
    )
    resume_from = training.check_run(run, arguments)
    splits = encoder_task.load_splits(data, arguments)
    names = classification.label_names(splits["train"], data)
    set_seed(arguments.seed)
    tokenizer, model = encoder_task.load_encoder(model_arguments, lora, names)
    encoded = encoder_task.encode_splits(splits, data, tokenizer, names)
    output_dir = Path(arguments.output_dir)
    check_disk_space(output_dir, model, full=lora.full)
    sizes = models.count_parameters(model)

    trainer = TargetTrainer(
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


def report(
    trainer: Trainer, sizes: tuple[int, int], metrics: dict[str, float], arguments: tuple[Any, ...], *, started: float
) -> None:
    """Write results.json and print the table."""
    facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
    output_dir = Path(trainer.args.output_dir)
    reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics}, arguments)
    shown = {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}
    reporting.print_table(f"classify: {output_dir}", {**facts, **shown})


if __name__ == "__main__":
    sys.exit(main())
