"""Records of a prompt, a completion that was preferred and one that was not."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.data import animals
from recipes.support import records, reporting
from recipes.support.arguments import DEMO
from recipes.support.completion import BadRecordError, checked_turns
from recipes.support.errors import RecipeError
from recipes.support.records import Records
from recipes.support.task_arguments import PreferenceDataArguments

_DATA_SEED = 0

_Pair = dict[str, Any]
_Renderer = Callable[[_Pair], tuple[list[int], list[int], list[int]]]


def load_splits(data: PreferenceDataArguments, *, seed: int) -> tuple[Records, Records]:
    """Load the pairs to train on and those to evaluate on.

    Raises:
        RecipeError: a file is bad, or there is nothing to evaluate on.
    """
    if data.dataset_name == DEMO:
        _announce_demo()
        train, validation = records.select(*demo_records(), data, seed=seed)
    else:
        train, validation = records.load_training_splits(data, seed=seed)
    if validation is None:
        raise RecipeError(
            "nothing to evaluate on: give --validation_file, or --validation_fraction above 0 to hold out."
        )
    return train, validation


def demo_records() -> tuple[Records, Records]:
    """Return the embedded pairs to train on, and those of other animals to evaluate on."""
    train, validation = animals.make_preferences(seed=_DATA_SEED)
    return Records(Dataset.from_list(train), "demo[train]"), Records(Dataset.from_list(validation), "demo[validation]")


def prepare(
    pairs: Records, data: PreferenceDataArguments, tokenizer: PreTrainedTokenizerBase, *, limit: int
) -> Dataset:
    """Check every pair, and return those that teach something as `prompt`, `chosen` and `rejected` for TRL.

    A pair teaches nothing where the prompt alone fills `limit` tokens, or where both completions are the same within
    it. TRL cuts at `limit` too, and drops the former, without a word.

    Raises:
        RecipeError: a column is missing, a pair is bad (with its line), or nothing is left to train on.
    """
    read = _choose_format(pairs, data, tokenizer)
    kept, num_cut, num_without_completion, num_alike = [], 0, 0, 0
    for index, record in enumerate(pairs.dataset):
        try:
            pair = read(record)
            prompt, chosen, rejected = render(pair, tokenizer)
        except BadRecordError as error:
            raise RecipeError(f"{pairs.locate(index)}: {error}") from error
        num_cut += max(len(chosen), len(rejected)) > limit
        if len(prompt) >= limit:
            num_without_completion += 1
        elif chosen[:limit] == rejected[:limit]:
            num_alike += 1
        else:
            kept.append(pair)
    _warn_of_losses(pairs, num_cut, num_without_completion, num_alike, limit)
    return Dataset.from_list(kept)


def render(pair: _Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """Return the token ids of the prompt, and of the prompt with each completion, as TRL makes them.

    Raises:
        BadRecordError: the chat template refuses the messages.
    """
    if isinstance(pair["prompt"], str):
        closing = tokenizer.eos_token or ""
        texts = [pair["prompt"], *(pair["prompt"] + pair[name] + closing for name in ("chosen", "rejected"))]
        prompt, chosen, rejected = tokenizer(texts)["input_ids"]
        return prompt, chosen, rejected
    try:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)
        chosen, rejected = (
            tokenizer.apply_chat_template(pair["prompt"] + pair[name], return_dict=True)["input_ids"]
            for name in ("chosen", "rejected")
        )
    except Exception as error:  # templates raise jinja's errors, among others for roles in an order they do not allow
        raise BadRecordError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error
    return prompt["input_ids"], chosen, rejected


def choose_prompts(validation: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return the token ids of `count` prompts, spread evenly over the dataset."""
    count = min(count, len(validation))
    return [render(validation[index * len(validation) // count], tokenizer)[0] for index in range(count)]


def _choose_format(
    pairs: Records, data: PreferenceDataArguments, tokenizer: PreTrainedTokenizerBase
) -> Callable[[_Pair], _Pair]:
    """Return what reads a record: text, or chats, where the first record has lists."""
    pairs.require_columns(("chosen_column", data.chosen_column), ("rejected_column", data.rejected_column))
    has_prompt = data.prompt_column in pairs.dataset.column_names
    if isinstance(pairs.dataset[0][data.chosen_column], list):
        if tokenizer.chat_template is None:
            raise RecipeError(
                f"{pairs.source} holds chats, which need a chat template, and this model's tokenizer has none:"
                " take a chat model, or give prompt, chosen and rejected as text."
            )
        return lambda record: _read_chat(record, data, has_prompt=has_prompt)
    pairs.require_columns(("prompt_column", data.prompt_column))
    return lambda record: _read_text(record, data)


def _read_text(record: _Pair, data: PreferenceDataArguments) -> _Pair:
    columns = {"prompt": data.prompt_column, "chosen": data.chosen_column, "rejected": data.rejected_column}
    pair = {name: record[column] for name, column in columns.items()}
    for name, value in pair.items():
        if not isinstance(value, str):
            raise BadRecordError(f"'{columns[name]}' must be text, not {value!r}.")
    return pair


def _read_chat(record: _Pair, data: PreferenceDataArguments, *, has_prompt: bool) -> _Pair:
    chosen, rejected = checked_turns(record[data.chosen_column]), checked_turns(record[data.rejected_column])
    if has_prompt:
        return {"prompt": checked_turns(record[data.prompt_column]), "chosen": chosen, "rejected": rejected}
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRecordError("the two chats must begin with the same turns: those are the prompt.")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _warn_of_losses(pairs: Records, num_cut: int, num_without_completion: int, num_alike: int, limit: int) -> None:
    total = len(pairs.dataset)
    if num_without_completion + num_alike == total:
        raise RecipeError(
            f"{pairs.source}: in none of the {total} pairs do the completions differ within {limit} tokens:"
            " nothing to learn from (--max_length)."
        )
    if num_cut:
        reporting.warn(f"{num_cut} of {total} pairs of {pairs.source} are longer than {limit} tokens and were cut")
    if num_without_completion:
        reporting.warn(
            f"{num_without_completion} of {total} pairs of {pairs.source} have no completion token left: dropped"
        )
    if num_alike:
        reporting.warn(f"{num_alike} of {total} pairs of {pairs.source} have the same completion twice: dropped")


def _announce_demo() -> None:
    """Say what runs, and what to pass for real work."""
    reporting.announce(
        "This is the demo: a small Llama that has read about animals learns to prefer answers to the point.\n"
        "For real work pass a model and your records (prompt, chosen and rejected), for example\n"
        "  --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl"
    )
