"""Train a text classifier through domains, one after the other, without a break: the optimizer goes on.

    python recipes/domains.py
    python -m recipes.data.clinc150 data_full.json clinc150 --domains domains.json
    python recipes/domains.py --model_name_or_path FOLDER --train_file clinc150/train.csv
        --validation_file clinc150/validation.csv --test_file clinc150/test.csv

The first line is the demo: a tiny encoder on embedded questions to a library's help desk, whose intents come three at
a time. Records need a column `domain` beside text and label. By default a label is told from those of every domain,
and all but the newest are soon forgotten; with `--scenario task_incremental` it is told from those of its own domain.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: F401  quiets bitsandbytes, which transformers imports by way of peft

# isort: split
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapters,
    classification,
    encoder_demo,
    encoder_task,
    parsers,
    records,
    sequence_report,
    training,
)
from recipes.support.arguments import DEMO, ClassifyDataArguments
from recipes.support.config import parse_recipe_arguments
from recipes.support.domain_sequence import (
    among,
    candidate_labels,
    cut,
    domain_metrics,
    domains_of,
    train_through,
)
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.target_loss import TargetTrainer
from recipes.support.task_arguments import DomainArguments

make_parser, DEMO_CONFIG = parsers.domains, parsers.DEMO_CONFIGS["domains"]
_INTENTS_A_DOMAIN = 3


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = parse_recipe_arguments(make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG)
    run, model_arguments, data, sequence, arguments = groups
    if training.check_run(run, arguments) is not None or arguments.save_strategy != "no":
        raise RecipeError("a sequence of domains is not resumed: leave --save_strategy no, and start it again.")
    splits = load_splits(data, sequence, arguments)
    domains = domains_of(splits["train"], sequence.domain_column)
    names = classification.label_names(splits["train"], data)
    set_seed(arguments.seed)
    tokenizer, model = encoder_task.load_encoder(model_arguments, names)
    encoded = encoder_task.encode_splits(splits, data, tokenizer, names)
    parts = {name: cut(splits[name], encoded[name], sequence.domain_column, domains) for name in splits}
    candidates = None
    if sequence.scenario == "task_incremental":
        candidates = candidate_labels(parts, names, domains)
        if arguments.label_smoothing_factor:
            raise RecipeError(
                f"label_smoothing_factor {arguments.label_smoothing_factor:g} would smooth over the labels of other "
                "domains: leave it 0 with --scenario task_incremental."
            )
    steps = sequence_report.StepCount()
    trainer = TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=parts["train"][0],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        narrow=None if candidates is None else among(candidates),
        callbacks=[steps],
    )
    adapters.use_loraplus(trainer, model_arguments)
    accuracies = train_through(trainer, domains, parts, candidates)
    num_records = len(encoded["train"])
    sequence_report.report(
        "domains", trainer, accuracies, domain_metrics, groups,
        num_steps=steps.count, num_records=num_records, started=started,
    )  # fmt: skip
    return 0


def load_splits(
    data: ClassifyDataArguments, sequence: DomainArguments, arguments: TrainingArguments
) -> dict[str, records.Records]:
    """Load the splits as `classify.py` does; the demo's get a domain for every three intents.

    Raises:
        RecipeError: as there.
    """
    splits = encoder_task.load_splits(data, arguments)
    if data.dataset_name != DEMO or sequence.domain_column in splits["train"].dataset.column_names:
        return splits
    intents = sorted({row["label"] for row in encoder_demo.demo_records()[0].dataset})
    domain_of = {intent: f"domain {index // _INTENTS_A_DOMAIN}" for index, intent in enumerate(intents)}
    return {name: _with_domain(split, sequence.domain_column, domain_of) for name, split in splits.items()}


def _with_domain(split: records.Records, column: str, domain_of: dict[str, str]) -> records.Records:
    domains = [domain_of[label] for label in split.dataset["label"]]
    return records.Records(split.dataset.add_column(column, domains), split.source)


if __name__ == "__main__":
    sys.exit(main())
