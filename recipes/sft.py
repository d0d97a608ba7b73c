"""Fine-tune a causal language model on your records, with a LoRA adapter or in full.

    python recipes/sft.py
    python recipes/sft.py --config recipes/configs/smollm2-135m/lora.yaml --train_file train.jsonl
    python recipes/sft.py --model_name_or_path FOLDER_OR_NAME --dataset_name NAME --optim adamw_torch

The first line is the demo: a small Llama, pretrained on the spot, learns to answer questions, offline, in two minutes.
The trainer is TRL's `SFTTrainer`, and of its arguments all have TRL's names, meanings and defaults but optim and
output_dir: what `trl sft --config` takes, this takes.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import causal_data, causal_run, generation, packing, parallel, parsers
from recipes.support.causal_trainer import TokenWeightedTrainer, first_and_last
from recipes.support.errors import exit_with_one_line

make_parser, DEMO_CONFIG = parsers.sft, parsers.DEMO_CONFIGS["sft"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = causal_run.parse(make_parser(), "sft", sys.argv[1:] if argv is None else argv)
    if (status := causal_run.instead_of_training(groups)) is not None:
        return status
    resume_from = causal_run.prepare(groups)
    splits = causal_data.load_splits(groups, causal_data.demo_questions)
    tokenizer = causal_run.load_tokenizer(groups)
    encoded = causal_data.encode(splits, groups, tokenizer)
    model = causal_run.load_model(groups)
    causal_data.preview_run(splits, encoded, groups, tokenizer, model)
    encoded = {name: split.dataset for name, split in encoded.items()}
    model, sizes = causal_run.add_adapter(model, groups)
    trainer = make_trainer(model, tokenizer, groups, encoded)
    shown = encoded.get("validation", encoded["train"])
    num_prompts = parallel.num_sample_generations(trainer.accelerator, groups[2].num_sample_generations)
    return causal_run.train(
        trainer,
        groups,
        recipe="sft",
        resume_from=resume_from,
        prompts=generation.choose_prompts(shown, num_prompts),
        evaluate=lambda: first_and_last(trainer, encoded.get("test")),
        sizes=sizes,
        num_records=len(encoded["train"]),
        source=splits["train"].source,
        started=started,
    )


def make_trainer(model: Any, tokenizer: Any, groups: tuple[Any, ...], encoded: dict[str, Any]) -> TokenWeightedTrainer:
    """Return TRL's trainer over records that are tokens already, packed if asked to."""
    arguments = groups[-1]
    # What TRL would do to records by itself has been done, with every loss counted.
    arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
    train = packing.pack(encoded["train"], arguments) if arguments.packing else encoded["train"]
    trainer = causal_run.make_trainer(
        TokenWeightedTrainer,
        model,
        groups,
        train_dataset=train,
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
    )
    if arguments.packing:
        packing.watch_separation(trainer)
    return trainer


if __name__ == "__main__":
    sys.exit(main())
