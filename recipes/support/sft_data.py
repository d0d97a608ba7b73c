"""What the scripts for supervised fine-tuning train on: the records that were named, or the demo."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from recipes.support import causal_demo, completion, records, reporting
from recipes.support.arguments import DEMO, SftDataArguments
from recipes.support.errors import RecipeError


def load_splits(data: SftDataArguments, *, seed: int) -> tuple[records.Records, records.Records]:
    """Load the records to train on and those to evaluate on.

    Raises:
        RecipeError: a file is bad, or there is nothing to evaluate on.
    """
    if data.dataset_name == DEMO:
        _announce_demo()
        train, validation = records.select(*causal_demo.demo_records(), data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
    if validation is None:
        raise RecipeError(
            "nothing to evaluate on: give --validation_file, or --validation_fraction above 0 to hold out."
        )
    return train, validation


def encode_splits(
    splits: tuple[records.Records, records.Records],
    data: SftDataArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
) -> tuple[Dataset, Dataset]:
    """Tokenise both splits, within the context of the model that `config` describes; see `encode_records`."""
    context_length = getattr(config, "max_position_embeddings", None)
    train, validation = (
        completion.encode_records(split, data, tokenizer, context_length=context_length) for split in splits
    )
    return train, validation


def prepare_demo_model(output_dir: Path, *, keep: bool, show_progress: bool) -> str:
    """Pretrain the demo model into output_dir/base, on one process of each machine; with `keep`, unless it is there.

    Communication: a barrier, with several processes.
    """
    base, state = output_dir / "base", PartialState()
    with state.local_main_process_first():
        if state.is_local_main_process and not (keep and base.is_dir()):
            causal_demo.build_base(base, show_progress=show_progress)
    return str(base)


def _announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a small Llama that has read about animals learns to answer questions about them.\n"
        "For real work pass a model and your records (messages, prompt and completion, or text), for example\n"
        "  --model_name_or_path HuggingFaceTB/SmolLM2-135M --train_file train.jsonl"
    )
