"""Fine-tune an encoder for text classification, with a LoRA adapter or in full.

    python recipes/classify.py
    python recipes/classify.py --config recipes/configs/minilm/classify.yaml --model_name_or_path FOLDER
        --train_file train.csv --test_file test.csv --label_column category

The first line is the demo: a tiny encoder on embedded questions to a library's help desk, offline, in seconds.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: F401  quiets bitsandbytes, which transformers imports by way of peft

# isort: split
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import classification, classifier, classifier_files, encoder_task, merging, parsers, training
from recipes.support.errors import exit_with_one_line
from recipes.support.label_metrics import make_compute_metrics
from recipes.support.target_loss import TargetTrainer

make_parser, DEMO_CONFIG = parsers.classify, parsers.DEMO_CONFIGS["classify"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = classifier.parse(make_parser(), argv, demo_config=DEMO_CONFIG)
    run, model_arguments, data, arguments = groups
    if merging.is_all_to_do(run, model_arguments, arguments):
        return classifier_files.complete(Path(arguments.output_dir), AutoModelForSequenceClassification, merge=True)
    resume_from = training.check_run(*groups)
    splits = encoder_task.load_splits(data, arguments)
    names = classification.label_names(splits["train"], data)
    set_seed(arguments.seed)
    tokenizer, model = encoder_task.load_encoder(model_arguments, names)
    encoded = encoder_task.encode_splits(splits, data, tokenizer, names)
    trainer = TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(),
    )
    return classifier.run(
        "classify", trainer, encoded, lambda name: classification.most_frequent_share(encoded[name]), groups,
        auto_class=AutoModelForSequenceClassification, resume_from=resume_from, started=started,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
