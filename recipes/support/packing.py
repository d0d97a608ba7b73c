"""Several short records in one row, so that little of a batch is padding; no record attends to another.

A row starts counting positions anew with each record, and has no attention mask: transformers then builds a mask with
one block a record (`find_packed_sequence_indices` in transformers/masking_utils.py), and FlashAttention takes the
boundaries from the positions. Not every model goes by that, so it is tried out before training.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.support.completion import IGNORED
from recipes.support.errors import RecipeError

# As a share of the largest logit. Other neighbours of the same length change nothing at all in the same kernels; a
# mixture of experts may group its tokens otherwise, and round otherwise.
_TOLERANCE = 1e-3
_PROBED_TOKENS = 12


def pack(encoded: Dataset, max_length: int) -> Dataset:
    """Put records together into rows of at most `max_length` tokens, each where it leaves the least room.

    Args:
        encoded: as `completion.encode_records` returns it, no record longer than `max_length`.
        max_length: of a row.

    Returns:
        A dataset of `input_ids`, `labels` and `position_ids`, not padded. The first label of a record is no target:
        nothing predicts it.
    """
    return Dataset.from_list(
        [_join([encoded[index] for index in row]) for row in assign(lengths(encoded), max_length)]
    )


def lengths(encoded: Dataset) -> list[int]:
    """Return how many tokens each record has."""
    return [len(ids) for ids in encoded["input_ids"]]


def assign(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign records to rows by best fit, the longest first; the result depends on the sizes alone.

    Returns:
        For each row, the indices of its records in ascending order.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left, and in which row; ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        position = bisect_left(room, (sizes[index], -1))
        left, row = room.pop(position) if position < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - sizes[index], row))
    return [sorted(row) for row in rows]


class PackedCollator:
    """Pads rows to the longest; a padding token is a record of its own, without a target."""

    def __init__(self, pad_token_id: int) -> None:
        """Pad with `pad_token_id`."""
        self._padding = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return one tensor (batch, time) a column."""
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
            for name, value in self._padding.items()
        }


class SeparationCheck(TrainerCallback):
    """Tries out, once a model that is cut into pieces is in place, that it keeps packed records apart.

    Communication: under FSDP and ZeRO-3 that of a forward pass.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        """Try it out on the model that is trained.

        Raises:
            RecipeError: it does not keep them apart.
        """
        require_separation(model, model.config)


def require_separation(model: Any, config: PreTrainedConfig) -> None:
    """Check that the logits of a record do not depend on its neighbour in the row.

    Raises:
        RecipeError: the model lets one record see another, or does not take positions.
    """
    was_training = model.training
    model.eval()
    try:
        difference = _influence_of_the_neighbour(model, config.get_text_config().vocab_size)
    except TypeError as error:
        raise RecipeError(f"packing: this model takes no position_ids ({error}): drop packing.") from error
    finally:
        model.train(was_training)
    if not difference <= _TOLERANCE:
        raise RecipeError(
            "packing: this model lets the records of a row see each other (another neighbour changes a record's"
            f" logits by {difference:.2g} of the largest): drop packing."
        )


def _influence_of_the_neighbour(model: Any, vocabulary_size: int) -> float:
    """Return by how much another first record changes the logits of the second, as a share of the largest."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    neighbours, record = (
        torch.randint(vocabulary_size, (count, _PROBED_TOKENS), generator=generator) for count in (2, 1)
    )
    rows = torch.cat([neighbours, record.expand(2, -1)], dim=1).to(device)
    positions = torch.arange(_PROBED_TOKENS, device=device).repeat(2, 2)
    with torch.no_grad():
        logits = model(input_ids=rows, position_ids=positions).logits[:, _PROBED_TOKENS:].float()
    largest = logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((logits[0] - logits[1]).abs().max() / largest)


def _join(records: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for record in records:
        row["input_ids"] += record["input_ids"]
        row["labels"] += [IGNORED, *record["labels"][1:]]
        row["position_ids"] += range(len(record["input_ids"]))
    return row
