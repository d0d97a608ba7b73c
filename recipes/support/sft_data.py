"""What the scripts for supervised fine-tuning train on: the records that were named, or the demo."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import DataCollator, DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedTokenizerBase

from recipes.support import causal_demo, chat, completion, packing, records, reporting
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
    """Tokenise both splits, within the context of the model that `config` describes; see `encode_records`.

    With `chat_template` the tokenizer gets that one, and is saved with it.
    """
    if data.chat_template is not None:
        tokenizer.chat_template = chat.load_template(data.chat_template, tokenizer)
    context_length = getattr(config, "max_position_embeddings", None)
    train, validation = (
        completion.encode_records(split, data, tokenizer, context_length=context_length) for split in splits
    )
    return train, validation


def encode_test(
    name: str, data: SftDataArguments, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> Dataset:
    """Load and tokenise the file that is measured at the end, and with `packing` pack it, as is done with the others.

    Raises:
        RecipeError: the file is bad.
    """
    context_length = getattr(config, "max_position_embeddings", None)
    test = completion.encode_records(records.load_file(name), data, tokenizer, context_length=context_length)
    return packing.pack(test, max(data.max_length, *packing.lengths(test))) if data.packing else test


def make_batches(
    splits: tuple[Dataset, Dataset], data: SftDataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[Dataset, Dataset], DataCollator]:
    """Return what goes into batches, and how: records as they are, or with `packing` rows of several."""
    if not data.packing:
        return splits, DataCollatorForSeq2Seq(tokenizer)
    # What is over the model's context has been cut off, so that no record is longer than a row.
    longest = max(max(packing.lengths(split)) for split in splits)
    train, validation = (packing.pack(split, max(longest, data.max_length)) for split in splits)
    reporting.announce(f"packing: {len(splits[0])} records in {len(train)} rows of up to {data.max_length} tokens")
    return (train, validation), packing.PackedCollator(tokenizer.pad_token_id)


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
