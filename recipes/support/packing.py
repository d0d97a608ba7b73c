"""Several short records in one row, by TRL; no record attends to another.

A row starts counting positions anew with each record, and has no attention mask: transformers then builds a mask with
one block a record (`find_packed_sequence_indices` in transformers/masking_utils.py), and FlashAttention takes the
boundaries from the positions. Not every model goes by that, so it is tried out before training.
"""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, pack_dataset

from recipes.support import parallel, reporting
from recipes.support.errors import RecipeError

# As a share of the largest logit. Other neighbours of the same length change nothing at all in the same kernels; a
# mixture of experts may group its tokens otherwise, and round otherwise.
_TOLERANCE = 1e-3
_PROBED_TOKENS = 12


def pack(encoded: Dataset, arguments: SFTConfig) -> Dataset:
    """Put records together into rows of `max_length` tokens, by `packing_strategy`.

    Args:
        encoded: `input_ids` and `labels`, no record longer than `max_length`.
        arguments: of the run.

    Returns:
        A dataset of `input_ids`, `labels` and `seq_lengths`, as TRL's collator takes it.

    Raises:
        RecipeError: there is no `max_length`.
    """
    if arguments.max_length is None:
        raise RecipeError("packing fills rows of max_length tokens, and there is none: give --max_length.")
    packed = pack_dataset(encoded, arguments.max_length, arguments.packing_strategy)
    reporting.announce(f"packing: {len(encoded)} records in {len(packed)} rows of up to {arguments.max_length} tokens")
    return packed


def watch_separation(trainer: Trainer) -> None:
    """Try out that the model keeps packed records apart: now, or where it is cut, once it is in place.

    Raises:
        RecipeError: it does not keep them apart.
    """
    if trainer.args.packing_strategy == "wrapped":
        reporting.warn("packing_strategy wrapped cuts records anywhere and lets them see each other; bfd does not")
    elif parallel.is_whole(trainer.accelerator):
        require_separation(trainer.model, trainer.model.config)
    else:
        trainer.add_callback(SeparationCheck())


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
