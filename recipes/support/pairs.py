"""Preferences checked, and as TRL's DPOTrainer reads them: a prompt and two completions, the preferred one first."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedTokenizerBase

from recipes.support import chat, mapping
from recipes.support.errors import RecipeError
from recipes.support.formats import Format, Row
from recipes.support.mapping import ALIKE, BAD, USED, WITHOUT_TARGET, OnBadRecord
from recipes.support.pair_formats import recognise_pairs
from recipes.support.records import Records
from recipes.support.rendering import Renderer
from recipes.support.reporting import warn
from recipes.support.turns import BadRecordError

_COMPLETIONS = ("chosen", "rejected")
_NUM_TRIED = 1000


def prepare_pairs(
    records: Records,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    columns: Mapping[str, str | None] | None = None,
    num_proc: int | None = None,
    on_bad_record: OnBadRecord = "drop",
) -> Dataset:
    """Check every pair, and return those that teach something as `prompt`, `chosen` and `rejected`.

    A pair teaches nothing where the prompt alone fills `max_length` tokens, or where both completions are the same
    within it. TRL cuts there too, and drops the former, without a word.

    Args:
        records: of any format that `recognise_pairs` knows.
        tokenizer: with the chat template that is to be used.
        max_length: of a prompt with its completion.
        columns: see `recognise_pairs`.
        num_proc: how many processes share the work.
        on_bad_record: drop records that cannot be used, with one warning for all, or raise the first.

    Raises:
        RecipeError: a column is missing, a bad record if asked for, tools that a template leaves out, or nothing left.

    Communication: barriers, with several processes; the first checks and the others read what it kept.
    """
    found = recognise_pairs(records, columns, has_template=tokenizer.chat_template is not None)
    is_chat = _holds_chats(records, found)
    if is_chat and tokenizer.chat_template is None:
        raise RecipeError(
            f"{records.source} holds chats, which need a chat template, and this model's tokenizer has none:"
            " take a chat model, or give prompt, chosen and rejected as text."
        )
    check = PairCheck(tokenizer, found, is_chat=is_chat, limit=max_length)
    options = (is_chat, max_length)
    table = mapping.map_records(
        records, found, check, _features(is_chat=is_chat), tokenizer, options=options, num_proc=num_proc
    )
    status = mapping.column_of(table, "status")
    mapping.raise_first(records, table, status, on_bad_record)
    _warn_of_losses(records, table, status, max_length)
    kept = np.flatnonzero(status == USED)
    dataset = table if len(kept) == len(table) else table.select(kept)
    beside = [name for name in ("tools", "chat_template_kwargs") if name in records.dataset.column_names and is_chat]
    return dataset.select_columns(["prompt", *_COMPLETIONS, *beside])


class PairCheck:
    """Reads a pair, and tells what it would teach."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, found: Format, *, is_chat: bool, limit: int | None) -> None:
        """Check pairs of the format `found`, up to `limit` tokens."""
        self._tokenizer, self._convert, self._limit = tokenizer, found.convert, limit
        self._renderer = Renderer(tokenizer, marks_assistant=False) if is_chat else None

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the columns of `_features` for one record."""
        pair = self._convert(row)
        if isinstance(pair["prompt"], str) != (self._renderer is None):
            kinds = ("text", "chats") if self._renderer else ("a chat", "text")
            raise BadRecordError(f"this record holds {kinds[0]}, those before it {kinds[1]}.")
        if self._renderer is None and chat.begins_texts(self._tokenizer):
            # TRL has the tokenizer begin the text, even one that a template began already.
            pair["prompt"] = pair["prompt"].removeprefix(self._tokenizer.bos_token)
        prompt, chosen, rejected, left_out = self._render(pair)
        longest = max(len(chosen), len(rejected))
        status = USED
        if self._limit is not None and len(prompt) >= self._limit:
            status = WITHOUT_TARGET
        elif chosen[: self._limit] == rejected[: self._limit]:
            status = ALIKE
        written = self._written(pair) if self._renderer else pair
        return {**written, "length": longest, "status": status, "without_reasoning": left_out}

    def _render(self, pair: Row) -> tuple[list[int], list[int], list[int], bool]:
        """Return the token ids of the prompt, and of the prompt with each completion, as TRL makes them.

        The last is whether the template leaves out reasoning of the prompt.
        """
        if self._renderer is None:
            closing = self._tokenizer.eos_token or ""
            texts = [pair["prompt"] + pair[name].removesuffix(closing) + closing for name in _COMPLETIONS]
            prompt, chosen, rejected = self._tokenizer([pair["prompt"], *texts], verbose=False)["input_ids"]
            return prompt, chosen, rejected, False
        beside = pair.get("tools"), pair.get("chat_template_kwargs")
        prompt, given = self._renderer.render(pair["prompt"], *beside, prompt=True).ids, len(pair["prompt"])
        chosen, rejected = (
            self._renderer.render(pair["prompt"] + pair[name], *beside, given=given) for name in _COMPLETIONS
        )
        return prompt, chosen.ids, rejected.ids, chosen.without_reasoning or rejected.without_reasoning

    def _written(self, pair: Row) -> Row:
        """Return the columns of a chat as TRL reads them; what is nested is kept as JSON."""
        turns = {name: self._renderer.with_contents(pair[name]) for name in ("prompt", *_COMPLETIONS)}
        tools = pair.get("tools")
        return {
            **{name: [json.dumps(turn) for turn in messages] for name, messages in turns.items()},
            "tools": None if tools is None else json.dumps(tools),
            "chat_template_kwargs": json.dumps(pair.get("chat_template_kwargs") or {}),
        }


def choose_prompts(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return the token ids of `count` prompts of what `prepare_pairs` returned, spread evenly over it."""
    count = min(count, len(pairs))
    chosen = [pairs[index * len(pairs) // count] for index in range(count)]
    if isinstance(pairs[0]["prompt"], str):
        return [tokenizer(pair["prompt"])["input_ids"] for pair in chosen]
    renderer = Renderer(tokenizer, marks_assistant=False)
    return [
        renderer.render(pair["prompt"], json.loads(pair.get("tools") or "null"), prompt=True).ids for pair in chosen
    ]


def _features(*, is_chat: bool) -> Features:
    kind = List(Json()) if is_chat else Value("string")
    beside = {"tools": Value("string"), "chat_template_kwargs": Json()} if is_chat else {}
    counted = {
        "length": Value("int32"),
        "status": Value("int8"),
        "reason": Value("string"),
        "without_reasoning": Value("bool"),
    }
    return Features({**dict.fromkeys(("prompt", *_COMPLETIONS), kind), **beside, **counted})


def _holds_chats(records: Records, found: Format) -> bool:
    """Whether the first pair that can be read is of chats."""
    for row in islice(iter(records.dataset), _NUM_TRIED):
        try:
            return isinstance(found.convert(row)["prompt"], list)
        except BadRecordError:
            continue
    return False


def _warn_of_losses(records: Records, table: Dataset, status: np.ndarray, limit: int | None) -> None:
    source, total = records.source, len(status)
    numbers = {kind: int((status == kind).sum()) for kind in (WITHOUT_TARGET, ALIKE, BAD)}
    if numbers[BAD] == total:
        raise RecipeError(f"{source}: no pair can be used; the first is {mapping.name_bad(records, table, 0)}")
    if sum(numbers.values()) == total:
        within = f" within {limit} tokens" if limit else ""
        raise RecipeError(
            f"{source}: in none of the {total} pairs do the completions differ{within}: nothing to learn from"
            " (--max_length)."
        )
    mapping.warn_of_bad(records, table, status)
    mapping.warn_of_lost_reasoning(records, table)
    if limit and (num_cut := int((mapping.column_of(table, "length") > limit).sum())):
        warn(f"{num_cut} of {total} pairs of {source} are longer than {limit} tokens and were cut")
    if numbers[WITHOUT_TARGET]:
        warn(f"{numbers[WITHOUT_TARGET]} of {total} pairs of {source} have no completion token left: dropped")
    if numbers[ALIKE]:
        warn(f"{numbers[ALIKE]} of {total} pairs of {source} have the same completion twice: dropped")
