"""Records of a source and a target text as token ids."""

import functools
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.support import records, reporting, seq2seq_demo
from recipes.support.arguments import DEMO
from recipes.support.errors import RecipeError
from recipes.support.records import Records
from recipes.support.splits import present
from recipes.support.task_arguments import Seq2SeqDataArguments


def load_splits(data: Seq2SeqDataArguments, *, seed: int, evaluates: bool) -> dict[str, Records]:
    """Load and check the splits there are: train, and of validation and test those that were named.

    Args:
        data: names files or a dataset.
        seed: draws what is held out.
        evaluates: whether validation data is needed during training.

    Raises:
        RecipeError: a file, a column or a record is bad, or there is nothing to evaluate on.
    """
    if data.dataset_name == DEMO:
        announce_demo()
        train, validation, test = seq2seq_demo.demo_records()
        train, validation = records.select(train, validation, data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
        test = records.load_file(data.test_file) if data.test_file else None
    check = functools.partial(check_records, data=data)
    return present(train, validation, test, check, evaluates=evaluates, named="file")


def check_records(split: Records, data: Seq2SeqDataArguments) -> None:
    """Check that every record has a source and a target that are text.

    Raises:
        RecipeError: naming the column, or the first bad record and its line.
    """
    columns = (("source_column", data.source_column), ("target_column", data.target_column))
    split.require_columns(*columns)
    for _, column in columns:
        for index, text in enumerate(split.dataset[column]):
            if not isinstance(text, str):
                raise RecipeError(f"{split.locate(index)}: '{column}' must be text, not {text!r}.")
    if not any(text.strip() for text in split.dataset[data.target_column]):
        raise RecipeError(f"{split.source}: '{data.target_column}' is empty in every record: nothing to learn.")


def encode(
    split: Records, data: Seq2SeqDataArguments, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None
) -> Dataset:
    """Tokenise a split; sources and targets that are cut are counted in a warning, empty targets dropped in another.

    Returns:
        A dataset of `input_ids`, `attention_mask` and `labels`, not padded.
    """
    pairs = list(zip(split.dataset[data.source_column], split.dataset[data.target_column], strict=True))
    kept = [(source, target) for source, target in pairs if target.strip()]
    source_limit = min(data.max_length, context_length or data.max_length)
    target_limit = min(data.max_target_length, context_length or data.max_target_length)
    sources, cut_sources = _cut(
        tokenizer([data.source_prefix + source for source, _ in kept]), source_limit, tokenizer
    )
    targets, cut_targets = _cut(tokenizer(text_target=[target for _, target in kept]), target_limit, tokenizer)
    for number, kind, limit in ((cut_sources, "sources", source_limit), (cut_targets, "targets", target_limit)):
        if number:
            reporting.warn(f"{number} of {len(pairs)} {kind} of {split.source} were cut to {limit} tokens")
    if len(kept) < len(pairs):
        reporting.warn(f"{len(pairs) - len(kept)} of {len(pairs)} records of {split.source} have no target: dropped")
    masks = [[1] * len(ids) for ids in sources]
    return Dataset.from_dict({"input_ids": sources, "attention_mask": masks, "labels": targets})


def _cut(encoded: Any, limit: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], int]:
    """Cut to `limit` tokens, the last of which stays the end-of-text token where there was one."""
    texts, num_cut = [], 0
    for ids in encoded["input_ids"]:
        if len(ids) > limit:
            num_cut += 1
            closing = ids[-1:] if ids[-1] == tokenizer.eos_token_id else []
            ids = ids[: limit - len(closing)] + closing
        texts.append(ids)
    return texts, num_cut


def announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a tiny T5 learns to read dates in notes. For real work pass, for example,\n"
        "  --model_name_or_path google/flan-t5-base --train_file train.jsonl --source_column A --target_column B"
    )
