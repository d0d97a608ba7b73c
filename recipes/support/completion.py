"""Records for supervised fine-tuning as token ids, with the loss on the completion only."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.support import chat
from recipes.support.arguments import SftDataArguments
from recipes.support.errors import RecipeError
from recipes.support.records import Records
from recipes.support.reporting import warn

# Labels of this value are no targets, for torch's cross-entropy and the metrics alike.
IGNORED = -100

_Encoder = Callable[[dict[str, Any]], tuple[list[int], list[int]]]


class BadRecordError(ValueError):
    """A record that cannot be used; its place is added by whoever knows it."""


def encode_records(
    records: Records, data: SftDataArguments, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None
) -> Dataset:
    """Tokenise records of `messages`, `prompt` and `completion`, or `text`.

    Texts over `max_length`, or over the model's context if that is shorter, lose their end; records without a target
    left are dropped. Both are counted in a warning.

    Returns:
        A dataset of `input_ids`, `attention_mask` and `labels`, not padded.

    Raises:
        RecipeError: no known column, a bad record (with its line), or nothing left to train on.
    """
    encode = _choose_encoder(records, data, tokenizer)
    limit = min(data.max_length, context_length or data.max_length)
    rows, num_cut, num_without_target = [], 0, 0
    for index, record in enumerate(records.dataset):
        try:
            ids, labels = encode(record)
        except BadRecordError as error:
            raise RecipeError(f"{records.locate(index)}: {error}") from error
        num_cut += len(ids) > limit
        # The first token is never predicted, so a label there is no target.
        if any(label != IGNORED for label in labels[1:limit]):
            ids, labels = ids[:limit], labels[:limit]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        else:
            num_without_target += 1
    _warn_of_losses(records, num_cut, num_without_target, limit)
    return Dataset.from_list(rows)


def _warn_of_losses(records: Records, num_cut: int, num_without_target: int, limit: int) -> None:
    total = len(records.dataset)
    if num_without_target == total:
        raise RecipeError(
            f"{records.source}: none of the {total} records has a completion token within {limit} tokens:"
            " nothing to train on (--max_length)."
        )
    if num_cut:
        warn(f"{num_cut} of {total} records of {records.source} are longer than {limit} tokens and were cut")
    if num_without_target:
        warn(f"{num_without_target} of {total} records of {records.source} have no completion token left: dropped")


def _choose_encoder(records: Records, data: SftDataArguments, tokenizer: PreTrainedTokenizerBase) -> _Encoder:
    """Pick the format by the columns there are; a column that was named by a flag must exist."""
    named = [
        (f"{kind}_column", getattr(data, f"{kind}_column")) for kind in ("messages", "prompt", "completion", "text")
    ]
    records.require_columns(*((flag, column) for flag, column in named if column))
    messages, prompt, completion, text = (column or flag.removesuffix("_column") for flag, column in named)
    columns = set(records.dataset.column_names)
    formats: list[tuple[tuple[str, ...], _Encoder]] = [
        ((messages,), lambda record: _encode_messages(record[messages], tokenizer, data.assistant_only_loss)),
        ((prompt, completion), lambda record: _encode_pair(record[prompt], record[completion], tokenizer)),
        ((text,), lambda record: _encode_text(record[text], tokenizer)),
    ]
    # A column named by a flag decides; else the first format whose columns are there.
    wanted = {column for _, column in named if column}
    formats = [entry for entry in formats if not wanted or wanted & set(entry[0])] or formats
    for needed, encoder in formats:
        if columns.issuperset(needed):
            if needed != (messages,) and (data.assistant_only_loss is not None or data.chat_template is not None):
                warn(f"{records.source} has no chats: assistant_only_loss and chat_template are without effect")
            return encoder
    raise RecipeError(
        f"{records.source} has none of the columns 'messages', 'prompt' with 'completion', or 'text'; its columns are"
        f" {', '.join(records.dataset.column_names)}. Name yours: --prompt_column A --completion_column B, or another."
    )


def _encode_pair(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise BadRecordError(f"the {name} must be text, not {value!r}.")
    prompt_ids = _leading_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    # An empty completion would teach the model to say nothing at all: leave it without a target.
    closing = _closing_ids(tokenizer) if completion_ids else []
    return prompt_ids + completion_ids + closing, [IGNORED] * len(prompt_ids) + completion_ids + closing


def _encode_text(text: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if not isinstance(text, str):
        raise BadRecordError(f"the text must be text, not {text!r}.")
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = _leading_ids(tokenizer) + body + (_closing_ids(tokenizer) if body else [])
    return ids, list(ids)


def _encode_messages(
    messages: Any, tokenizer: PreTrainedTokenizerBase, assistant_only: bool | None
) -> tuple[list[int], list[int]]:
    turns = checked_turns(messages)
    if tokenizer.chat_template is None:
        raise BadRecordError(
            "'messages' need a chat template, which this model's tokenizer does not have: give --chat_template, a file"
            f" or one of {', '.join(chat.TEMPLATE_NAMES)}."
        )
    try:
        if assistant_only is False:
            ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
            mask = [1] * len(ids)
        elif "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
            rendered = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        else:
            ids, mask = _mask_by_prefixes(turns, tokenizer)
    except BadRecordError:
        raise
    except Exception as error:  # templates raise jinja's errors, among others for roles in an order they do not allow
        raise BadRecordError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error
    return list(ids), [token if is_target else IGNORED for token, is_target in zip(ids, mask, strict=True)]


def checked_turns(messages: Any) -> list[dict[str, Any]]:
    """Return the turns without the keys that other records brought in as null."""
    if not isinstance(messages, list) or not messages:
        raise BadRecordError("'messages' must be a list of at least one message.")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise BadRecordError(f"a message must have a 'role' and a 'content': {turn!r}.")
        if not isinstance(turn.get("content"), str):
            raise BadRecordError(f"the content of a message must be text: {turn!r}.")
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def _mask_by_prefixes(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the assistant's tokens as what each of its turns adds to the chat before it."""

    def render(part: list[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        return list(tokenizer.apply_chat_template(part, add_generation_prompt=prompt, return_dict=True)["input_ids"])

    ids = render(turns)
    mask = [0] * len(ids)
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, through = render(turns[:index], prompt=True) if index else [], render(turns[: index + 1])
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise BadRecordError(
                f"the chat template rewrites turns before number {index + 1}, so its tokens cannot be told apart;"
                " give the tokenizer a template with {% generation %}, or records of prompt and completion."
            )
        mask[len(before) : len(through)] = [1] * (len(through) - len(before))
    return ids, mask


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.bos_token_id)] if chat.begins_texts(tokenizer) else []


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
