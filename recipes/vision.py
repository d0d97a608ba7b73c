"""Fine-tune an image classifier, with a LoRA adapter or in full.

    python recipes/vision.py
    python recipes/vision.py --architecture vit
    python recipes/vision.py --config recipes/configs/vit-base/lora.yaml --train_folder train --test_folder test

The first two lines are the demo: a small ResNet, or another architecture, learns to read digits, offline, in a minute.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapters,
    heads,
    image_data,
    image_model,
    models,
    parallel,
    parsers,
    reporting,
    training,
)
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.label_metrics import make_compute_metrics
from recipes.support.output import RESULTS_NAME, check_disk_space, naming_a_full_disk
from recipes.support.target_loss import TargetTrainer

make_parser, DEMO_CONFIG = parsers.vision, parsers.DEMO_CONFIGS["vision"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    run, model_arguments, data, lora, arguments = parse_recipe_arguments(
        make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG
    )
    resume_from = training.check_run(run, arguments)
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    splits, names = image_data.load_splits(data, seed=seed, evaluates=arguments.eval_strategy != "no")
    if model_arguments.architecture and not lora.full:
        raise RecipeError("a new model starts from random weights, which an adapter cannot mend: add --full.")
    set_seed(arguments.seed)
    processor, model = image_model.load(model_arguments, names)
    model = heads.add_adapter(model, lora, None)
    output_dir = Path(arguments.output_dir)
    check_disk_space(output_dir, model, full=lora.full)
    sizes = models.count_parameters(model)

    arguments.label_names = ["labels"]
    encoded = {name: image_data.encode(split, processor) for name, split in splits.items()}
    trainer = TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        processing_class=processor,
        data_collator=image_data.collate,
        compute_metrics=make_compute_metrics(),
    )
    adapters.use_loraplus(trainer, lora)
    metrics = training.train(trainer, run, resume_from=resume_from)
    metrics |= training.evaluate(trainer, encoded, lambda name: image_data.most_frequent_share(splits[name]))
    with naming_a_full_disk(output_dir):
        training.save_model(trainer)
        if trainer.is_world_process_zero():
            facts = training.describe_run(trainer, sizes, seconds=time.perf_counter() - started)
            report(output_dir, facts, metrics, (run, model_arguments, data, lora, arguments))
    parallel.leave_group(trainer.accelerator)
    return 0


def report(output_dir: Path, facts: dict[str, Any], metrics: dict[str, float], arguments: tuple[Any, ...]) -> None:
    """Write results.json and print the table."""
    reporting.write_results(output_dir / RESULTS_NAME, {**facts, **metrics}, arguments)
    shown = {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}
    reporting.print_table(f"vision: {output_dir}", {**facts, **shown})


if __name__ == "__main__":
    sys.exit(main())
