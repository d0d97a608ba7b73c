"""Fine-tune an image classifier, with a LoRA adapter or in full.

    python recipes/vision.py
    python recipes/vision.py --architecture vit
    python recipes/vision.py --config recipes/configs/vit-base/lora.yaml --train_folder train --test_folder test

The first two lines are the demo: a small ResNet, or another architecture, learns to read digits, offline, in a minute.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import recipes  # noqa: F401  quiets bitsandbytes, which transformers imports by way of peft

# isort: split
from transformers import AutoModelForImageClassification, set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    classifier,
    classifier_files,
    heads,
    image_data,
    image_model,
    merging,
    parsers,
    training,
)
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.label_metrics import make_compute_metrics
from recipes.support.target_loss import TargetTrainer

make_parser, DEMO_CONFIG = parsers.vision, parsers.DEMO_CONFIGS["vision"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = classifier.parse(make_parser(), argv, demo_config=DEMO_CONFIG)
    run, model_arguments, data, arguments = groups
    if merging.is_all_to_do(run, model_arguments, arguments):
        return classifier_files.complete(Path(arguments.output_dir), AutoModelForImageClassification, merge=True)
    resume_from = training.check_run(*groups)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    splits, names = image_data.load_splits(data, seed=seed, evaluates=arguments.eval_strategy != "no")
    if model_arguments.architecture and model_arguments.use_peft:
        raise RecipeError("a new model starts from random weights, which an adapter cannot mend: drop --use_peft.")
    set_seed(arguments.seed)
    processor, model = image_model.load(model_arguments, names)
    encoded = {name: image_data.encode(split, processor) for name, split in splits.items()}
    arguments.label_names = ["labels"]
    trainer = TargetTrainer(
        model=heads.add_adapter(model, model_arguments, None),
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        processing_class=processor,
        data_collator=image_data.collate,
        compute_metrics=make_compute_metrics(),
    )
    return classifier.run(
        "vision", trainer, encoded, lambda name: image_data.most_frequent_share(splits[name]), groups,
        auto_class=AutoModelForImageClassification, resume_from=resume_from, started=started,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
