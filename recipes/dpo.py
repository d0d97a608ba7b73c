"""Teach a causal language model preferences by DPO, with a LoRA adapter or in full.

    python recipes/dpo.py
    python recipes/dpo.py --model_name_or_path FOLDER_OR_NAME --use_peft --train_file train.jsonl --beta 0.1
    python recipes/dpo.py --model_name_or_path outputs/sft --dataset_name NAME --learning_rate 1e-6

The first line is the demo: a small Llama, pretrained on the spot, learns to prefer answers that are to the point. The
trainer is TRL's `DPOTrainer`, and of its arguments all have TRL's names, meanings and defaults but optim and
output_dir. A folder with the adapter of an earlier run is trained on, and is the reference as it was then.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support import (
    adapter_start,
    causal_data,
    causal_run,
    pairs,
    parallel,
    parsers,
    preference_checks,
    preference_metrics,
)
from recipes.support.causal_trainer import PreferenceTrainer
from recipes.support.errors import exit_with_one_line
from recipes.support.reporting import warn

make_parser, DEMO_CONFIG = parsers.dpo, parsers.DEMO_CONFIGS["dpo"]


@exit_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    started = time.perf_counter()
    groups = causal_run.parse(make_parser(), "dpo", sys.argv[1:] if argv is None else argv)
    if (status := causal_run.instead_of_training(groups)) is not None:
        return status
    preference_checks.check(groups[1], groups[3])
    resume_from = causal_run.prepare(groups)
    splits = causal_data.load_splits(groups, causal_data.demo_preferences)
    tokenizer = causal_run.load_tokenizer(groups)
    prepared = causal_data.prepare_pairs(splits, groups, tokenizer)
    model, sizes = causal_run.add_adapter(causal_run.load_model(groups), groups)
    trainer = make_trainer(model, tokenizer, groups, prepared)
    num_prompts = parallel.num_sample_generations(trainer.accelerator, groups[2].num_sample_generations)
    before = preference_metrics.preference_accuracy(trainer)
    return causal_run.train(
        trainer,
        groups,
        recipe="dpo",
        resume_from=resume_from,
        prompts=pairs.choose_prompts(prepared.get("validation", prepared["train"]), tokenizer, num_prompts),
        evaluate=lambda: preference_metrics.first_and_last(trainer, preferred_before=before),
        sizes=sizes,
        num_records=len(prepared["train"]),
        source=splits["train"].source,
        started=started,
    )


def make_trainer(model: Any, tokenizer: Any, groups: tuple[Any, ...], prepared: dict[str, Any]) -> PreferenceTrainer:
    """Return TRL's trainer. The reference is the model without its new adapter, or before the old one was trained on.

    Of an adapter that took a part of the base with it the reference is base and adapter as they began. Where every
    weight is trained it is a second copy of the model, unless its log-probabilities are computed first.
    """
    _, of_model, _, arguments = groups
    if of_model.lora_dropout and of_model.has_adapter and arguments.disable_dropout:
        warn("lora_dropout has no effect: DPO compares without dropout (--disable_dropout false keeps it)")
    needs_copy = not of_model.has_adapter and not arguments.precompute_ref_log_probs
    # TRL (1.16) takes an adapter that it is given for a trained one, and copies it as the reference.
    with adapter_start.as_it_is(model):
        trainer = causal_run.make_trainer(
            PreferenceTrainer,
            model,
            groups,
            ref_model=causal_run.load_base(groups) if needs_copy else None,
            train_dataset=prepared["train"],
            eval_dataset=prepared.get("validation"),
            processing_class=tokenizer,
        )
    is_new = of_model.has_adapter and of_model.adapter_name_or_path is None
    if is_new and not adapter_start.is_converted(of_model):
        # A new one changes nothing: the model with its adapter switched off is the same, at no cost.
        trainer.model.delete_adapter("ref")
    return trainer


if __name__ == "__main__":
    sys.exit(main())
