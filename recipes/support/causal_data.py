"""What sft.py and dpo.py train on: the records that were named, or the demo, as tokens or as pairs."""

from collections.abc import Callable
from typing import Any

import pyarrow.compute
from datasets import Dataset

from recipes.data import animals
from recipes.support import encoding, models, pairs, preview, records, reporting, stopping
from recipes.support.arguments import DEMO
from recipes.support.encoding import Encoded
from recipes.support.errors import RecipeError
from recipes.support.records import Records

_DEMO_SEED = 0

Splits = dict[str, Records]


def demo_questions() -> tuple[Records, Records]:
    """Return the embedded questions to train on, and those about other animals; says what the demo is."""
    _announce_demo("answer questions about them", "messages, prompt and completion, or text")
    return _embedded(animals.make_questions)


def demo_preferences() -> tuple[Records, Records]:
    """Return the embedded pairs to train on, and those about other animals; says what the demo is."""
    _announce_demo("prefer answers to the point", "prompt, chosen and rejected")
    return _embedded(animals.make_preferences)


def load_splits(groups: tuple[Any, ...], load_demo: Callable[[], tuple[Records, Records]]) -> Splits:
    """Load the records to train on, and of validation and test those that were named or are asked for.

    Where nothing is to be evaluated during training, none are held out for it.

    Args:
        groups: the arguments.
        load_demo: returns the embedded records.

    Raises:
        RecipeError: a file is bad, or there is nothing to evaluate on.
    """
    run, _, data, arguments = groups
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    evaluates = arguments.eval_strategy != "no"
    if not evaluates:
        data.validation_fraction = 0.0
    if data.dataset_name == DEMO:
        train, validation = records.select(*load_demo(), data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
    if evaluates and validation is None:
        raise RecipeError(
            f"eval_strategy = {arguments.eval_strategy}, and there is nothing to evaluate on: give --validation_file,"
            " or --validation_fraction above 0 to hold out, or --eval_strategy no."
        )
    if not evaluates and not data.validation_file:
        validation = None  # of a dataset that happens to have a split for it
    arguments.eval_on_start = arguments.eval_on_start and validation is not None
    test = records.load_file(run.test_file) if run.test_file else None
    splits = {"train": train, "validation": validation, "test": test}
    return {name: split for name, split in splits.items() if split is not None}


def encode(splits: Splits, groups: tuple[Any, ...], tokenizer: Any) -> dict[str, Encoded]:
    """Tokenise every split, within the context of the model.

    Raises:
        RecipeError: the columns are unknown, no record is left, or the tokenizer is larger than the model's embedding.
    """
    _, of_model, data, arguments = groups
    num_embeddings = models.load_config(of_model).get_text_config().vocab_size
    columns = {kind: getattr(data, f"{kind}_column") for kind in ("messages", "prompt", "completion")}
    # TRL's default names no column of yours.
    columns["text"] = arguments.dataset_text_field if arguments.dataset_text_field != "text" else None
    encoded = {}
    # TRL cuts nothing that these pack: what does not fit goes on in the next row.
    goes_on = arguments.packing and arguments.packing_strategy in ("bfd_split", "wrapped")
    for name, split in splits.items():
        encoded[name] = encoding.encode(
            split,
            tokenizer=tokenizer,
            columns=columns,
            max_length=None if goes_on and name == "train" else _limit(groups),
            assistant_only_loss=arguments.assistant_only_loss,
            completion_only_loss=arguments.completion_only_loss,
            num_proc=arguments.dataset_num_proc,
            on_bad_record=data.on_bad_record,
        )
        _require_embedded(encoded[name].dataset, num_embeddings, tokenizer)
    return encoded


def prepare_pairs(splits: Splits, groups: tuple[Any, ...], tokenizer: Any) -> dict[str, Dataset]:
    """Check the pairs of every split, and return those that teach something as TRL takes them.

    Raises:
        RecipeError: the columns are unknown, or no pair is left.
    """
    _, _, data, arguments = groups
    arguments.max_length = _limit(groups)
    return {
        name: pairs.prepare_pairs(
            split,
            tokenizer=tokenizer,
            max_length=arguments.max_length,
            columns={kind: getattr(data, f"{kind}_column") for kind in ("prompt", "chosen", "rejected")},
            num_proc=arguments.dataset_num_proc,
            on_bad_record=data.on_bad_record,
        )
        for name, split in splits.items()
    }


def preview_run(
    splits: Splits, encoded: dict[str, Encoded], groups: tuple[Any, ...], tokenizer: Any, model: Any
) -> None:
    """Show a record with its targets, the counts, and whether what is trained on makes generation stop.

    Where an end of turn is learned at which generation would not stop, it is made to.
    """
    arguments, train = groups[-1], encoded["train"]
    limit = _limit(groups)
    verdict = stopping.judge(train.dataset, tokenizer, model, limit=limit, packing=arguments.packing)
    stopping.let_stop(model, verdict)
    reporting.announce(preview.describe(splits["train"].source, train, tokenizer, verdict))


def _limit(groups: tuple[Any, ...]) -> int | None:
    """Return how many tokens a record may have: `max_length`, or the model's context if that is shorter."""
    _, of_model, _, arguments = groups
    context_length = getattr(models.load_config(of_model).get_text_config(), "max_position_embeddings", None)
    return min((limit for limit in (arguments.max_length, context_length) if limit), default=None)


def _embedded(make: Callable[..., tuple[list[Any], list[Any]]]) -> tuple[Records, Records]:
    train, validation = make(seed=_DEMO_SEED)
    return Records(Dataset.from_list(train), "demo[train]"), Records(Dataset.from_list(validation), "demo[validation]")


def _require_embedded(encoded: Dataset, num_embeddings: int, tokenizer: Any) -> None:
    """Refuse token ids that the model has no embedding for: it would end in an index that is out of range."""
    largest = max(pyarrow.compute.max(chunk.flatten()).as_py() for chunk in encoded.data.column("input_ids").chunks)
    if largest >= num_embeddings:
        raise RecipeError(
            f"the tokenizer makes token {largest} ({tokenizer.decode([largest])!r}), and the model has"
            f" {num_embeddings} embeddings: they do not belong together, or tokens were added and"
            " model.resize_token_embeddings was not called."
        )


def _announce_demo(learns: str, columns: str) -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        f"This is the demo: a small Llama that has read about animals learns to {learns}.\n"
        f"For real work pass a model and your records ({columns}), for example\n"
        "  --model_name_or_path HuggingFaceTB/SmolLM2-135M --use_peft --train_file train.jsonl"
    )
