"""Records for supervised fine-tuning as token ids with their targets, ready for TRL's SFTTrainer.

What is a target is as TRL has it. Ours is that every record that is cut, dropped or bad is counted and said.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipes.support import chat, formats, mapping
from recipes.support.errors import RecipeError
from recipes.support.formats import Format, Row
from recipes.support.mapping import BAD, USED, WITHOUT_TARGET, OnBadRecord
from recipes.support.records import Records
from recipes.support.rendering import Rendered, Renderer
from recipes.support.reporting import warn
from recipes.support.turns import Turn

# Labels of this value are no targets, for torch's cross-entropy and the metrics alike.
IGNORED = -100
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "targets": Value("int32"),
        "merged": Value("bool"),
        "without_reasoning": Value("bool"),
        "status": Value("int8"),
        "reason": Value("string"),
    }
)


@dataclass(frozen=True)
class Counts:
    """What became of the records of one split.

    Attributes:
        records: how many there were.
        used: how many are left to train on.
        tokens: of those, after cutting.
        targets: how many of the tokens are learnt.
        cut: records that lost their end.
        without_target: records dropped because nothing in them would be learnt.
        bad: records dropped because they cannot be read, or the chat template refuses or does not carry them.
        without_reasoning: records of which the template leaves out reasoning that is not learnt.
    """

    records: int
    used: int
    tokens: int
    targets: int
    cut: int
    without_target: int
    bad: int
    without_reasoning: int = 0


@dataclass(frozen=True)
class Encoded:
    """A data set of `input_ids` and `labels`, not padded, and what became of the records.

    Attributes:
        dataset: one row a record.
        counts: of the records.
        learns_users: whether what users write in chats is learnt like what the assistant does.
    """

    dataset: Dataset
    counts: Counts
    learns_users: bool = False


def encode(
    records: Records,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    context_length: int | None = None,
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    columns: Mapping[str, str | None] | None = None,
    num_proc: int | None = None,
    on_bad_record: OnBadRecord = "drop",
) -> Encoded:
    """Tokenise records of any format that `formats.recognise` knows.

    Args:
        records: to be tokenised.
        tokenizer: with the chat template that is to be used.
        max_length: what is longer loses its end.
        context_length: of the model; the shorter of both counts.
        assistant_only_loss: of a chat, learn the assistant's turns alone, not every token.
        completion_only_loss: learn completions alone, not prompts; None: where there are prompts, which is the same.
        columns: see `formats.recognise`.
        num_proc: how many processes tokenise.
        on_bad_record: drop records that cannot be used, with one warning for all, or raise the first.

    Raises:
        RecipeError: no known column, a bad record if asked for, tools that a template leaves out, or nothing left.

    Communication: barriers, with several processes; the first tokenises and the others read what it kept.
    """
    found = formats.recognise(records, columns)
    if not found.is_text and tokenizer.chat_template is None:
        raise RecipeError(
            f"{records.source} holds chats, which need a chat template, and this model's tokenizer has none: give"
            f" --chat_template_path, a file or one of {', '.join(chat.TEMPLATE_NAMES)}."
        )
    if found.is_text and assistant_only_loss:
        warn(f"{records.source} has no chats: assistant_only_loss is without effect")
    limit = min((size for size in (max_length, context_length) if size), default=None)
    encoder = Encoder(
        tokenizer, found, assistant_only=assistant_only_loss, completion_only=completion_only_loss, limit=limit
    )
    options = (assistant_only_loss, completion_only_loss, limit)
    table = mapping.map_records(records, found, encoder, _FEATURES, tokenizer, options=options, num_proc=num_proc)
    status = mapping.column_of(table, "status")
    mapping.raise_first(records, table, status, on_bad_record)
    kept = np.flatnonzero(status == USED)
    counts = _count(table, status, kept, limit)
    _warn_of_losses(records, table, status, counts, limit)
    dataset = table if len(kept) == len(table) else table.select(kept)
    learns_users = found.becomes == ("messages",) and not assistant_only_loss
    return Encoded(dataset.select_columns(["input_ids", "labels"]), counts, learns_users)


class Encoder:
    """Tokenises a batch of records; each becomes a row, whatever becomes of it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        found: Format,
        *,
        assistant_only: bool,
        completion_only: bool | None,
        limit: int | None,
    ) -> None:
        """Tokenise records of the format `found`, up to `limit` tokens."""
        self._tokenizer = tokenizer
        self._convert = found.convert
        self._completion_only = completion_only is not False
        self._limit = limit
        self._renderer = None
        if tokenizer.chat_template is not None and not found.is_text:
            self._renderer = Renderer(tokenizer, marks_assistant=assistant_only)

    def __call__(self, row: Row) -> dict[str, Any]:
        """Return the columns of `_FEATURES` for one record."""
        row = self._convert(row)
        merged = False
        if "text" in row:
            ids, mask, left_out = self._text(row["text"])
        elif "messages" in row:
            ids, mask, left_out = self._chat(row["messages"], row)
        else:
            ids, mask, left_out, merged = self._pair(row)
        length = len(ids)
        ids, mask = np.asarray(ids[: self._limit], np.int32), np.asarray(mask[: self._limit], bool)
        # The first token is never predicted, so a label there is no target; older transformers would count it.
        mask[:1] = False
        num_targets = int(mask.sum())
        return {
            "input_ids": ids,
            "labels": np.where(mask, ids, np.int32(IGNORED)),
            "length": length,
            "targets": num_targets,
            "merged": merged,
            "without_reasoning": left_out,
            "status": USED if num_targets else WITHOUT_TARGET,
        }

    def _chat(self, messages: list[Turn], row: Row, *, prompt: bool = False, given: int = 0) -> Rendered:
        return self._renderer.render(messages, row["tools"], row["chat_template_kwargs"], prompt=prompt, given=given)

    def _text(self, text: str) -> Rendered:
        ids = self._ids(self._closed(text) if text else text)
        return Rendered(ids, [int(bool(text))] * len(ids))

    def _pair(self, row: Row) -> tuple[list[int], list[int], bool, bool]:
        """Find where the completion begins; a prompt whose last tokens merge with it is `merged`."""
        prompt, completion, left_out = row["prompt"], row["completion"], False
        if isinstance(prompt, str):
            prompt_ids, ids = self._ids(prompt), self._ids(prompt + self._closed(completion))
            # An empty completion would teach the model to say nothing at all: leave it without a target.
            mask = [int(bool(completion))] * len(ids)
        else:
            prompt_ids = self._chat(prompt, row, prompt=True).ids
            given = len(prompt) if self._completion_only else 0
            ids, mask, left_out = self._chat(prompt + completion, row, given=given)
        begin = common_prefix_length(prompt_ids, ids)
        if self._completion_only:
            mask = [0] * begin + mask[begin:]
        return ids, mask, left_out, begin < len(prompt_ids)

    def _ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        # Texts that a template was applied to begin with the token that the tokenizer puts before them.
        return ids[1:] if ids[:2] == [self._tokenizer.bos_token_id] * 2 else ids

    def _closed(self, text: str) -> str:
        eos = self._tokenizer.eos_token
        return text if eos is None or text.endswith(eos) else text + eos


def _count(table: Dataset, status: np.ndarray, kept: np.ndarray, limit: int | None) -> Counts:
    lengths, targets = (mapping.column_of(table, name) for name in ("length", "targets"))
    return Counts(
        records=len(status),
        used=len(kept),
        tokens=int(np.minimum(lengths[kept], limit or np.inf).sum()),
        targets=int(targets[kept].sum()),
        cut=int((lengths > limit).sum()) if limit else 0,
        without_target=int((status == WITHOUT_TARGET).sum()),
        bad=int((status == BAD).sum()),
        without_reasoning=mapping.count_true(table, "without_reasoning"),
    )


def _warn_of_losses(records: Records, table: Dataset, status: np.ndarray, counts: Counts, limit: int | None) -> None:
    source, total = records.source, counts.records
    if not counts.used and counts.bad:
        first = mapping.name_bad(records, table, int(np.argmax(status == BAD)))
        raise RecipeError(f"{source}: none of the {total} records can be used; the first bad one is {first}")
    if not counts.used:
        within = f" within {limit} tokens" if limit else ""
        raise RecipeError(
            f"{source}: none of the {total} records has a completion token{within}: nothing to train on"
            " (--max_length)."
        )
    mapping.warn_of_bad(records, table, status)
    if counts.cut:
        warn(f"{counts.cut} of {total} records of {source} are longer than {limit} tokens and were cut")
    if counts.without_target:
        warn(f"{counts.without_target} of {total} records of {source} have no completion token left: dropped")
    mapping.warn_of_lost_reasoning(records, table)
    if merged := mapping.count_true(table, "merged"):
        warn(
            f"in {merged} of {total} records of {source} the end of the prompt merges with the completion, or is"
            " written otherwise before one: the completion begins there; end prompts before a space"
        )
