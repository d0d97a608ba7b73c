"""Records of a text and a label, as token ids and class indices."""

import re
from collections import Counter
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from recipes.support.arguments import ClassifyDataArguments
from recipes.support.errors import RecipeError
from recipes.support.records import Records

# A number with a fraction, as text: of a CSV.
_FRACTION = re.compile(r"[-+]?\d*\.\d*[1-9]\d*([eE][-+]?\d+)?")


def check_records(records: Records, data: ClassifyDataArguments) -> None:
    """Check that every record has a text and a label.

    Raises:
        RecipeError: naming the column, or the first bad record and its line.
    """
    records.require_columns(("text_column", data.text_column), ("label_column", data.label_column))
    for index, text in enumerate(records.dataset[data.text_column]):
        if not isinstance(text, str) or not text.strip():
            raise RecipeError(f"{records.locate(index)}: '{data.text_column}' must be text, not {text!r}.")
    for index, label in enumerate(records.dataset[data.label_column]):
        if label is None or label == "":
            raise RecipeError(f"{records.locate(index)}: '{data.label_column}' is missing.")
        if _is_quantity(label):
            raise RecipeError(
                f"{records.locate(index)}: '{data.label_column}' is {label!r}: a class is a name or a whole number;"
                " quantities and lists cannot be learned here. If it is a class, name it, such as 'grade 1.5'."
            )


def _is_quantity(label: Any) -> bool:
    if isinstance(label, float):
        return not label.is_integer()
    return bool(_FRACTION.fullmatch(label)) if isinstance(label, str) else not isinstance(label, int)


def label_names(train: Records, data: ClassifyDataArguments) -> list[str]:
    """Return the classes, sorted, or in the order in which the dataset itself declares them.

    Raises:
        RecipeError: there are fewer than two.
    """
    feature = train.dataset.features[data.label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    labels = set(train.dataset[data.label_column])
    # Numbers sort as numbers, also those of a CSV, which are text: 10 comes after 9.
    names = sorted(map(str, labels), key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    if len(names) < 2:
        raise RecipeError(
            f"{train.source}: '{data.label_column}' has the single value {names[0]!r}: nothing to tell apart."
        )
    return names


def without_new_labels(held_out: Records, train: Records, data: ClassifyDataArguments) -> tuple[Records, int]:
    """Leave out records whose label no training record has: those of a rare class, all of which were held out.

    Returns:
        The others, and how many were left out.

    Raises:
        RecipeError: nothing is left.
    """
    known, labels = set(train.dataset[data.label_column]), held_out.dataset[data.label_column]
    kept = [index for index, label in enumerate(labels) if label in known]
    if len(kept) == len(labels):
        return held_out, 0
    if not kept:
        raise RecipeError(
            f"{held_out.source}: none of the labels held out occurs in the training data: hold out fewer records."
        )
    return held_out.subset(kept), len(labels) - len(kept)


def encode_records(
    records: Records, data: ClassifyDataArguments, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> tuple[Dataset, int]:
    """Tokenise, without padding: batches are padded to their own longest text.

    Returns:
        A dataset of `input_ids`, `attention_mask` and `labels`, and how many texts were cut to `max_length`.

    Raises:
        RecipeError: a record has a label that the training data does not have.
    """
    feature = records.dataset.features[data.label_column]
    index_of = {name: index for index, name in enumerate(names)}
    labels = []
    for index, label in enumerate(records.dataset[data.label_column]):
        name = feature.int2str(label) if isinstance(feature, ClassLabel) else str(label)
        if name not in index_of:
            raise RecipeError(
                f"{records.locate(index)}: the label {name!r} does not occur in the training data: add records that"
                " have it, or take this one out."
            )
        labels.append(index_of[name])
    texts = list(records.dataset[data.text_column])
    lengths = map(len, tokenizer(texts, truncation=False, verbose=False)["input_ids"])
    encoded: dict[str, Any] = dict(tokenizer(texts, truncation=True, max_length=data.max_length))
    return Dataset.from_dict({**encoded, "labels": labels}), sum(length > data.max_length for length in lengths)


def most_frequent_share(dataset: Dataset) -> float:
    """Return the accuracy of always answering the most frequent class."""
    return max(Counter(dataset["labels"]).values()) / len(dataset)
