"""The parser of each recipe. Importing this imports no torch: `hf-tam recipes validate` reads configurations by it."""

import importlib
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support.arguments import (
    ClassifyDataArguments,
    LoopArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    SftDataArguments,
    SftModelArguments,
    SftRunArguments,
)
from recipes.support.config import CONFIGS, RecipeParser, precision_of_the_launch
from recipes.support.task_arguments import (
    ClassifierRunArguments,
    DomainArguments,
    PreferenceDataArguments,
    Seq2SeqDataArguments,
    ShiftArguments,
    VisionDataArguments,
    VisionModelArguments,
)

DEMO_CONFIGS = {
    "classify": CONFIGS / "demo" / "classify.yaml",
    "domains": CONFIGS / "demo" / "domains.yaml",
    "dpo": CONFIGS / "demo" / "dpo-lora.yaml",
    "no_trainer": CONFIGS / "demo" / "no-trainer-lora.yaml",
    "seq2seq": CONFIGS / "demo" / "seq2seq.yaml",
    "sft": CONFIGS / "demo" / "sft-lora.yaml",
    "shift": CONFIGS / "demo" / "shift.yaml",
    "vision": CONFIGS / "demo" / "vision.yaml",
}


def classify() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "classify",
        [ClassifierRunArguments, ModelArguments, ClassifyDataArguments, LoraArguments, TrainingArguments],
        "Fine-tune an encoder for text classification. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        warmup_steps=0.1,
        save_total_limit=2,
    )


def domains() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "domains",
        [RunArguments, ModelArguments, ClassifyDataArguments, DomainArguments, LoraArguments, TrainingArguments],
        "Train a text classifier through a sequence of domains. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
    )


def dpo() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    from trl import DPOConfig  # which only this recipe needs

    return _parser(
        "dpo",
        [RunArguments, ModelArguments, PreferenceDataArguments, LoraArguments, DPOConfig],
        "Teach a causal language model preferences by DPO. Without arguments: the embedded demo.",
        learning_rate=5e-5,
        warmup_steps=0.1,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        # As in the other recipes, and not as in TRL, these are off until they are asked for.
        bf16=False,
        gradient_checkpointing=False,
    )


def no_trainer() -> RecipeParser:
    """Return the parser of every argument."""
    return RecipeParser(
        [RunArguments, SftModelArguments, SftDataArguments, LoraArguments, LoopArguments],
        prog="no_trainer.py",
        description="Fine-tune a causal language model in a hand-written loop. Without arguments: the embedded demo.",
    )


def seq2seq() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "seq2seq",
        [RunArguments, ModelArguments, Seq2SeqDataArguments, LoraArguments, Seq2SeqTrainingArguments],
        "Fine-tune a T5-style model on sources and targets. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        warmup_steps=0.05,
        predict_with_generate=True,
        save_total_limit=2,
    )


def sft() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "sft",
        [SftRunArguments, SftModelArguments, SftDataArguments, LoraArguments, TrainingArguments],
        "Fine-tune a causal language model on your records. Without arguments: the embedded demo.",
        learning_rate=2e-4,
        warmup_steps=0.05,
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=2,
        ddp_find_unused_parameters=False,
    )


def shift() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "shift",
        [RunArguments, VisionModelArguments, VisionDataArguments, ShiftArguments, TrainingArguments],
        "Train an image classifier through a sequence of tasks. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        remove_unused_columns=False,
    )


def vision() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "vision",
        [ClassifierRunArguments, VisionModelArguments, VisionDataArguments, LoraArguments, TrainingArguments],
        "Fine-tune an image classifier. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        warmup_steps=0.1,
        save_total_limit=2,
        # The columns that the model does not know are those that the images are made of.
        remove_unused_columns=False,
    )


def _parser(name: str, kinds: list[Any], description: str, **defaults: Any) -> RecipeParser:
    """Return the parser of a recipe with the Trainer: what all of them have, the machine's defaults, then its own."""
    parser = RecipeParser(kinds, prog=f"{name}.py", description=description)
    common = {"output_dir": f"outputs/{name}", "optim": "adatamw", "logging_steps": 10}
    parser.set_defaults(**{**common, **defaults, **_defaults_of_the_machine()})
    return parser


def _defaults_of_the_machine() -> dict[str, bool]:
    """Return what is pinned and rounded where nothing is said of it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:  # kept out where arguments are only read, which is not what this default is for
        return precision_of_the_launch()
    return {"dataloader_pin_memory": torch.cuda.is_available(), **precision_of_the_launch()}
