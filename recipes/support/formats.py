"""What records look like, told by their columns, and how they become what TRL calls its types of data sets."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Json, Value

from recipes.support.errors import RecipeError
from recipes.support.records import Records
from recipes.support.reporting import announce, warn
from recipes.support.turns import BadRecordError, Turn, read_tools, read_turns, without_nulls

Row = dict[str, Any]

CHATS = ("messages", "conversations", "conversation")
# Columns of a request, of what it is about, and of the answer; those of Alpaca, Dolly and question answering.
_INSTRUCTIONS = (
    ("Alpaca", "instruction", "input", "output"),
    ("instructions", "instruction", "context", "response"),
    ("instructions", "instruction", "input", "response"),
    ("questions", "question", None, "answer"),
    ("questions", "query", None, "response"),
)
_BESIDE = ("system", "history")
_OF_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
ALWAYS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Format:
    """How a record is read.

    Attributes:
        name: what the records are called.
        columns: those that are read.
        becomes: the columns that a record becomes.
        convert: does it, for one record; raises BadRecordError.
    """

    name: str
    columns: tuple[str, ...]
    becomes: tuple[str, ...]
    convert: Callable[[Row], Row]

    @property
    def is_text(self) -> bool:
        """Whether there are no chats, for certain."""
        return self.name in ("text", "prompts and completions as text")


def recognise(records: Records, columns: Mapping[str, str | None] | None = None) -> Format:
    """Tell how records for supervised fine-tuning are written, and say so in a line.

    Args:
        records: their columns decide, and of some the first value.
        columns: which column to read for `messages`, `prompt`, `completion` or `text`, where one is given.

    Raises:
        RecipeError: a column that was given is missing, or none is known.
    """
    # 'text' is TRL's default for the column of texts, and no choice.
    given = {kind: column for kind, column in (columns or {}).items() if column and (kind, column) != ("text", "text")}
    records.require_columns(*((_FLAGS[kind], column) for kind, column in given.items()))
    present = set(records.dataset.column_names)
    found = _format_of_given(records, given) if given else _format_of_columns(records, present)
    if found is None:
        raise RecipeError(_unknown(records, present))
    return announced(records, found)


_FLAGS = {
    "messages": "messages_column",
    "prompt": "prompt_column",
    "completion": "completion_column",
    "text": "dataset_text_field",
}


def _format_of_given(records: Records, given: dict[str, str]) -> Format:
    """Return the format whose columns were named by flags; of a pair one may be."""
    if "messages" in given:
        return _chats(records, given["messages"])
    if "text" in given:
        return Format("text", (given["text"],), ("text",), partial(_read_text, column=given["text"]))
    prompt, completion = given.get("prompt", "prompt"), given.get("completion", "completion")
    records.require_columns(("prompt_column", prompt), ("completion_column", completion))
    return _pairs(records, prompt, completion)


def _format_of_columns(records: Records, present: set[str]) -> Format | None:
    if chats := [column for column in CHATS if column in present]:
        return _chats(records, chats[0])
    if present.issuperset(("prompt", "completion")):
        if records.dataset.features.get("label") == Value("bool"):
            raise RecipeError(
                f"{records.source} holds good and bad completions, told by 'label': that is data for KTO; to learn all"
                " of them, give --prompt_column prompt."
            )
        return _pairs(records, "prompt", "completion")
    if present.issuperset(("chosen", "rejected")):
        raise RecipeError(
            f"{records.source} holds preferences ('chosen' and 'rejected'): that is data for dpo.py; to learn the"
            " chosen ones alone, give --prompt_column prompt --completion_column chosen, or --messages_column chosen."
        )
    for name, request, about, answer in _INSTRUCTIONS:
        if present.issuperset((request, answer)):
            about = about if about in present else None
            used = tuple(column for column in (request, about, answer, *_BESIDE) if column in present)
            convert = partial(_read_instruction, request=request, about=about, answer=answer)
            return Format(name, used, ("prompt", "completion"), convert)
    if "text" in present:
        return Format("text", ("text",), ("text",), partial(_read_text, column="text"))
    return None


def _chats(records: Records, column: str) -> Format:
    first = first_value(records, column)
    is_sharegpt = isinstance(first, list) and first and isinstance(first[0], dict) and first[0].get("from") is not None
    name = "ShareGPT conversations" if is_sharegpt else "chats"
    beside = tuple(key for key in ("system",) if key in records.dataset.column_names)
    convert = partial(_read_chat, column=column, nulls=has_nulls(records, column))
    return Format(name, (column, *beside), ("messages",), convert)


def _pairs(records: Records, prompt: str, completion: str) -> Format:
    is_chat = isinstance(first_value(records, completion), list) or isinstance(first_value(records, prompt), list)
    name = "prompts and completions as chats" if is_chat else "prompts and completions as text"
    convert = partial(_read_pair, prompt=prompt, completion=completion, nulls=has_nulls(records, prompt))
    return Format(name, (prompt, completion), ("prompt", "completion"), convert)


def _read_text(row: Row, *, column: str) -> Row:
    return {"text": _text(row[column], column)}


def _read_chat(row: Row, *, column: str, nulls: bool) -> Row:
    turns = read_turns(row[column], nulls=nulls)
    return {"messages": system_turn(row, turns) + turns, **beside(row, nulls=nulls)}


def _read_pair(row: Row, *, prompt: str, completion: str, nulls: bool) -> Row:
    values = {"prompt": row[prompt], "completion": row[completion]}
    if any(isinstance(value, list) for value in values.values()):
        asked, answer = (
            as_turns(values[kind], role, column, nulls=nulls)
            for kind, role, column in (("prompt", "user", prompt), ("completion", "assistant", completion))
        )
        return {"prompt": asked, "completion": answer, **beside(row, nulls=nulls)}
    return {kind: _text(value, kind, article="the ") for kind, value in values.items()}


def _read_instruction(row: Row, *, request: str, about: str | None, answer: str) -> Row:
    """A chat of one turn each: `about` follows the request, as its second paragraph."""
    turns = system_turn(row, []) + _history(row) + [{"role": "user", "content": request_of(row, request, about)}]
    return {"prompt": turns, "completion": as_turns(row[answer], "assistant", answer), **beside(row)}


def request_of(row: Row, request: str, about: str | None) -> str:
    """Return what is asked for, with what it is about as further paragraphs."""
    further = row.get(about) if about else None
    return "\n\n".join([_text(row[request], request), *([_text(further, str(about))] if further else [])])


def _history(row: Row) -> list[Turn]:
    """Return the turns before, which Alpaca's relatives write as pairs of a request and an answer."""
    pairs = row.get("history") or []
    pairs = json.loads(pairs) if isinstance(pairs, str) else pairs
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise BadRecordError("'history' must be a list of pairs of a request and an answer.")
    return [
        {"role": role, "content": _text(text, "history")}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def system_turn(row: Row, turns: list[Turn]) -> list[Turn]:
    """Return the turn that the column `system` adds, unless the chat has one."""
    system = row.get("system")
    has_one = bool(turns) and turns[0]["role"] == "system"
    return [{"role": "system", "content": system}] if isinstance(system, str) and system and not has_one else []


def beside(row: Row, *, nulls: bool = True) -> Row:
    """Return what comes with a chat: the tools, and options of the template, as TRL names them."""
    options = row.get("chat_template_kwargs") or {}
    return {
        "tools": read_tools(row.get("tools"), nulls=nulls),
        "chat_template_kwargs": json.loads(options) if isinstance(options, str) else without_nulls(options),
    }


def as_turns(value: Any, role: str, column: str, *, nulls: bool = True) -> list[Turn]:
    """Return a list of turns as it is, and text as one turn of `role`."""
    if isinstance(value, list):
        return read_turns(value, nulls=nulls)
    return [{"role": role, "content": _text(value, column)}]


def _text(value: Any, column: str, *, article: str = "") -> str:
    if not isinstance(value, str):
        name = f"{article}{column}" if article else f"'{column}'"
        raise BadRecordError(f"{name} must be text, not {value!r}.")
    return value


def first_value(records: Records, column: str) -> Any:
    """Return the first value that is not null, of the first thousand."""
    values = records.dataset.select_columns(column).select(range(min(1000, len(records.dataset))))
    return next((row[column] for row in values if row[column] is not None), None)


def has_nulls(records: Records, column: str) -> bool:
    """Whether a null there was written: what datasets keeps as JSON is as it was, tables are filled up."""
    return holds_json(records.dataset.features[column])


def holds_json(feature: Any) -> bool:
    """Whether datasets keeps some of a column as JSON."""
    inner = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return isinstance(feature, Json) or any(holds_json(part) for part in inner if part is not None)


def announced(records: Records, found: Format) -> Format:
    """Say how records are read, and which columns of text are not."""
    announce(f"{records.source}: {found.name} ({', '.join(found.columns)}) -> {', '.join(found.becomes)}")
    unused = [
        name
        for name, feature in records.dataset.features.items()
        if (feature in (Value("string"), Value("large_string")) or name in _OF_MEDIA)
        if name not in (*found.columns, *ALWAYS) and name != "id" and not name.endswith("_id")
    ]
    if unused:
        warn(f"{records.source}: columns that are not used: {', '.join(unused)}")
    return found


def _unknown(records: Records, present: set[str]) -> str:
    known = "'messages' or 'conversations', 'prompt' with 'completion', 'instruction' with 'output', or 'text'"
    return (
        f"{records.source} has none of the columns {known}; its columns are {', '.join(records.dataset.column_names)}."
        " Name yours: --prompt_column A --completion_column B, or another."
    )
