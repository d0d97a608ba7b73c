"""Train through a sequence of tasks without a break: the labels change from task to task, the optimizer goes on.

    python recipes/shift.py
    python recipes/shift.py --flip_fraction 1.0 --optim adamw_torch --num_tasks 20

Every task has the same images; in each the labels of a share of the classes are permuted anew. The first line is the
demo: a small ResNet on scikit-learn's digits, offline.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import set_seed

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import image_data, image_model, parsers, sequence_report, training
from recipes.support.config import parse_recipe_arguments
from recipes.support.errors import RecipeError, exit_with_one_line
from recipes.support.label_shift import Labels, sequence_metrics, train_through
from recipes.support.target_loss import TargetTrainer

make_parser, DEMO_CONFIG = parsers.shift, parsers.DEMO_CONFIGS["shift"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = parse_recipe_arguments(make_parser(), sys.argv[1:] if argv is None else argv, demo_config=DEMO_CONFIG)
    run, model_arguments, data, shift, arguments = groups
    if training.check_run(run, arguments) is not None or arguments.save_strategy != "no":
        raise RecipeError("a sequence of tasks is not resumed: leave --save_strategy no, and start it again.")
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    splits, names = image_data.load_splits(data, seed=seed, evaluates=True)
    labels = Labels(len(names), num_tasks=shift.num_tasks, fraction=shift.flip_fraction, seed=seed)
    set_seed(arguments.seed)
    processor, model = image_model.load(model_arguments, names)
    arguments.label_names = ["labels"]
    encoded = {name: image_data.encode(split, processor) for name, split in splits.items()}
    trainer = TargetTrainer(model=model, args=arguments, train_dataset=encoded["train"], processing_class=processor)
    accuracies = train_through(trainer, labels, {name: encoded[name] for name in encoded if name != "train"})
    num_steps = shift.num_tasks * trainer.state.global_step
    num_records = len(encoded["train"])
    sequence_report.report(
        "shift", trainer, accuracies, sequence_metrics, groups,
        num_steps=num_steps, num_records=num_records, started=started,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
