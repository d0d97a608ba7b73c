"""The parser of each recipe. Importing this imports no torch: `hf-tam recipes validate` reads configurations by it."""

import importlib
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

import hf_tam  # noqa: F401  makes --optim adatamw, adatam and tam known
from recipes.support.arguments import (
    ClassifyDataArguments,
    LmModelArguments,
    ModelArguments,
    PreferenceDataArguments,
    RunArguments,
    SftDataArguments,
    SftRunArguments,
)
from recipes.support.config import CONFIGS, RecipeParser, precision_of_the_launch
from recipes.support.task_arguments import (
    ClassifierRunArguments,
    DomainArguments,
    Seq2SeqDataArguments,
    ShiftArguments,
    VisionDataArguments,
    VisionModelArguments,
)

DEMO_CONFIGS = {
    "classify": CONFIGS / "demo" / "classify.yaml",
    "domains": CONFIGS / "demo" / "domains.yaml",
    "dpo": CONFIGS / "demo" / "dpo-lora.yaml",
    "seq2seq": CONFIGS / "demo" / "seq2seq.yaml",
    "sft": CONFIGS / "demo" / "sft-lora.yaml",
    "shift": CONFIGS / "demo" / "shift.yaml",
    "vision": CONFIGS / "demo" / "vision.yaml",
}


def classify() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "classify",
        [ClassifierRunArguments, ModelArguments, ClassifyDataArguments, TrainingArguments],
        "Fine-tune an encoder for text classification. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        warmup_steps=0.1,
        save_total_limit=2,
    )


def domains() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "domains",
        [RunArguments, ModelArguments, ClassifyDataArguments, DomainArguments, TrainingArguments],
        "Train a text classifier through a sequence of domains. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
    )


def dpo() -> RecipeParser:
    """Return the parser of every argument; those of TRL have TRL's defaults."""
    from trl import DPOConfig  # which only this recipe needs

    return _parser(
        "dpo",
        [SftRunArguments, LmModelArguments, PreferenceDataArguments, DPOConfig],
        "Teach a causal language model preferences by DPO. Without arguments: the embedded demo.",
    )


def seq2seq() -> RecipeParser:
    """Return the parser of every argument, with this recipe's defaults."""
    return _parser(
        "seq2seq",
        [RunArguments, ModelArguments, Seq2SeqDataArguments, Seq2SeqTrainingArguments],
        "Fine-tune a T5-style model on sources and targets. Without arguments: the embedded demo.",
        learning_rate=1e-3,
        warmup_steps=0.05,
        predict_with_generate=True,
        save_total_limit=2,
    )


def sft() -> RecipeParser:
    """Return the parser of every argument; those of TRL have TRL's defaults."""
    from trl import SFTConfig  # which only this recipe needs

    return _parser(
        "sft",
        [SftRunArguments, LmModelArguments, SftDataArguments, SFTConfig],
        "Fine-tune a causal language model on your records. Without arguments: the embedded demo.",
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
        [ClassifierRunArguments, VisionModelArguments, VisionDataArguments, TrainingArguments],
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
    """Return what is pinned, rounded and trained on where nothing is said of it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:  # kept out where arguments are only read, which is not what this default is for
        return precision_of_the_launch()
    has_accelerator = torch.accelerator.is_available()
    # TRL trains in bfloat16 unless told otherwise, which transformers refuses where there is no GPU, but for use_cpu.
    return {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not has_accelerator,
        **precision_of_the_launch(),
    }
