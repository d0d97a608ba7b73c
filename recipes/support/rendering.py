"""Chats as token ids, with the tokens that the assistant writes told from the rest.

A chat template that marks the assistant's turns is taken at its word; for those it knows, TRL has marked copies; with
any other, a turn's borders are found in the text.
"""

import json
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from recipes.support.carried import WORD, find_lost
from recipes.support.spans import SpanFinder
from recipes.support.turns import BadRecordError, Turn

Tools = list[dict[str, Any]] | None

_OTHER_TEMPLATE = "take a template that carries it (--chat_template_path)"
_PROBE = [{"role": "user", "content": "a"}]
_PROBE_CALL = {"type": "function", "function": {"name": "probe", "arguments": {}}}


class LostToolsError(BadRecordError):
    """The template leaves tools out: that is no matter of one record."""


class Rendered(NamedTuple):
    """Token ids, for each whether it is a target, and whether reasoning of a turn that is not learnt is left out."""

    ids: list[int]
    mask: list[int]
    without_reasoning: bool = False


class Renderer:
    """Renders chats with the template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, marks_assistant: bool) -> None:
        """Choose the template.

        Args:
            tokenizer: has a chat template.
            marks_assistant: whether the assistant's tokens are to be told from the rest.
        """
        self._tokenizer = tokenizer
        self._template = _training_template(tokenizer) if marks_assistant else None
        self._marks_assistant = marks_assistant
        self._has_marks = tokenizer.is_fast and has_generation_markers(self._template or tokenizer.chat_template)

    def render(
        self,
        turns: list[Turn],
        tools: Tools = None,
        options: dict[str, Any] | None = None,
        *,
        prompt: bool = False,
        given: int = 0,
    ) -> Rendered:
        """Return token ids, and for each whether it is a target: the assistant's, or all of them.

        Args:
            turns: as `turns.read_turns` returns them.
            tools: as `turns.read_tools` returns them.
            options: further arguments of the template.
            prompt: whether to end with what begins the assistant's next turn.
            given: how many turns at the front are not learnt, whatever is a target here.

        Raises:
            BadRecordError: the template refuses them, or leaves out some of what is to be learnt.
        """
        options = {"tools": tools, **(options or {})}
        try:
            left_out = not prompt and self._require_carried(turns, options, given)
            ids, mask = self._render(turns, options, prompt=prompt)
            if not prompt and any(_is_given(turn) for turn in turns):
                mask = self._without_given(turns, mask)
        except BadRecordError:
            raise
        except (
            Exception
        ) as error:  # templates raise jinja's errors and Python's, for roles in an order they do not allow
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRecordError(f"the chat template refuses these messages: {reason}") from error
        return Rendered(ids, mask, left_out)

    def _render(self, turns: list[Turn], options: dict[str, Any], *, prompt: bool) -> tuple[list[int], list[int]]:
        if not self._marks_assistant or prompt:
            ids = self._ids(turns, options, prompt=prompt)
            return ids, [1] * len(ids)
        if not self._has_marks:
            return self._mask_by_spans(turns, options)
        turns = self.with_contents(turns)
        rendered = self._apply(turns, return_dict=True, return_assistant_tokens_mask=True, **options)
        ids, mask = list(rendered["input_ids"]), list(rendered["assistant_masks"])
        return ids, self._without_headers(ids, mask)

    def _ids(self, turns: list[Turn], options: dict[str, Any], *, prompt: bool = False) -> list[int]:
        turns = self.with_contents(turns)
        return list(self._apply(turns, add_generation_prompt=prompt, return_dict=True, **options)["input_ids"])

    def _text(self, turns: list[Turn], options: dict[str, Any], *, prompt: bool = False) -> str:
        turns = self.with_contents(turns)
        return str(self._apply(turns, tokenize=False, add_generation_prompt=prompt, **options))

    def _apply(self, turns: list[Turn], **options: Any) -> Any:
        options.setdefault("chat_template", self._template)
        if options.get("tokenize", True):
            options["tokenizer_kwargs"] = {"verbose": False}  # what is too long is cut, and counted, later
        try:
            return self._tokenizer.apply_chat_template(turns, **options)
        except TypeError:
            # Some templates join the arguments of a call to text, as OpenAI's API gives them.
            written = [_with_written_arguments(turn) for turn in turns]
            if written == turns:
                raise
            return self._tokenizer.apply_chat_template(written, **options)

    def _mask_by_spans(self, turns: list[Turn], options: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Find the assistant's tokens by the borders of its turns in the text."""
        text = self._text(turns, options)
        finder = SpanFinder(lambda some, prompt: self._text(some, options, prompt=prompt), self._marks)
        spans = finder.find(text, turns)
        ids, before = self._tokens(text)
        mask = [0] * len(ids)
        for begin, end in spans:
            first, last = before(begin), before(end)
            mask[first:last] = [1] * (last - first)
        return ids, self._without_headers(ids, mask)

    def _tokens(self, text: str) -> tuple[list[int], Callable[[int], int]]:
        """Return the tokens of a text, and how to tell how many of them end before a place in it."""
        options = {"add_special_tokens": False, "verbose": False}
        if self._tokenizer.is_fast:
            encoded = self._tokenizer(text, return_offsets_mapping=True, **options)
            ends = [end for _, end in encoded["offset_mapping"]]
            return list(encoded["input_ids"]), lambda place: bisect_right(ends, place)
        ids = list(self._tokenizer(text, **options)["input_ids"])
        return ids, lambda place: common_prefix_length(self._tokenizer(text[:place], **options)["input_ids"], ids)

    @cached_property
    def _marks(self) -> list[str]:
        """The tokens that no text is spelled with."""
        return [*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()]

    def _without_given(self, turns: list[Turn], mask: list[int]) -> list[int]:
        """Unmark the assistant's turns that are not to be learnt."""
        starts = [index for index, marked in enumerate(mask) if marked and not (index and mask[index - 1])]
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not self._marks_assistant or len(starts) != len(answers):
            raise BadRecordError(
                "a message has the weight 0 (or train: false), which takes assistant_only_loss and turns that can be"
                " told apart."
            )
        for start, turn in zip(starts, answers, strict=True):
            end = mask.index(0, start) if 0 in mask[start:] else len(mask)
            if _is_given(turn):
                mask[start:end] = [0] * (end - start)
        return mask

    @cached_property
    def _header(self) -> list[int]:
        """What begins a turn of the assistant."""
        try:
            before, through = self._ids(_PROBE, {}), self._ids(_PROBE, {}, prompt=True)
        except Exception:  # a template that refuses this one chat
            return []
        return through[len(before) :] if through[: len(before)] == before else []

    def _without_headers(self, ids: list[int], mask: list[int]) -> list[int]:
        """Unmark what is given when an answer is asked for: some of TRL's copies mark it, or its end."""
        header = self._header
        for start in [index for index, marked in enumerate(mask) if marked and not (index and mask[index - 1])]:
            size = min(start, len(header))
            while ids[start - size : start] != header[:size]:
                size -= 1
            for index, token in enumerate(header[size:], start=start):
                if index == len(ids) or ids[index] != token or not mask[index]:
                    break
                mask[index] = 0
        return mask

    def with_contents(self, turns: list[Turn]) -> list[Turn]:
        """Return the turns with contents that the template can take: in parts, or where a call has none."""
        return [{**turn, "content": self._content(turn.get("content"))} for turn in turns]

    def _content(self, content: str | None) -> str | list[dict[str, str]] | None:
        content = self._no_content if content is None else content
        return _in_parts(content) if self._takes_parts and isinstance(content, str) else content

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes contents in parts alone, as those of models that see do."""
        return not self._shows(WORD) and self._shows(_in_parts(WORD))

    def _shows(self, content: str | list[dict[str, str]]) -> bool:
        try:
            return WORD in self._apply([{"role": "user", "content": content}], tokenize=False)
        except Exception:  # a template that refuses this one chat
            return False

    @cached_property
    def _no_content(self) -> str | None:
        """How a call without a text is given: as null, unless the template would spell that, or lose the call."""
        for content in (None, ""):
            turn = {"role": "assistant", "content": content, "tool_calls": [_PROBE_CALL]}
            try:
                text = self._apply([*_PROBE, turn], tokenize=False)
            except Exception:  # the other may do
                continue
            if "probe" in text and "None" not in text:
                return content
        return ""

    def _require_carried(self, turns: list[Turn], options: dict[str, Any], given: int) -> bool:
        """Check that all of a chat stands in the text; return whether reasoning that is not learnt does not."""
        self._require_tools(turns, options)
        lost = find_lost(lambda some: self._text(some, options), turns)
        for part in lost:
            turn, shown = turns[part.turn], repr(part.text.strip()[:80])
            if part.kind != "reasoning":
                what = f"the call of {shown}" if part.kind == "call" else f"what the {turn['role']} says, {shown}"
                raise BadRecordError(f"the chat template leaves out {what}: mend the record, or {_OTHER_TEMPLATE}.")
            if part.turn >= given and not _is_given(turn):
                raise BadRecordError(
                    f"the chat template leaves out the reasoning of a turn that is learnt, {shown}: take it out of the"
                    f" record, learn the last answer alone (prompt and completion), or {_OTHER_TEMPLATE}."
                )
        return bool(lost)

    def _require_tools(self, turns: list[Turn], options: dict[str, Any]) -> None:
        """Check that tools, their calls and what they returned stand in the text."""
        names = [tool["function"]["name"] for tool in options["tools"] or []]
        names += [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", [])]
        returned = [str(turn["content"]).strip() for turn in turns if turn["role"] == "tool"]
        if not names and not returned:
            return
        text = self._text(turns, options)
        for kind, wanted in (("the tool", names), ("what a tool returned,", returned)):
            for value in wanted:
                if value not in text and json.dumps(value)[1:-1] not in text and not _holds_parsed(text, value):
                    raise LostToolsError(
                        f"the chat template leaves out {kind} {value[:80]!r}: take a model whose template knows tools,"
                        " or give --chat_template_path."
                    )


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_given(turn: Turn) -> bool:
    """Whether a turn of the assistant is not learnt, as OpenAI's and axolotl's records say it."""
    return turn["role"] == "assistant" and (turn.get("weight", 1) == 0 or turn.get("train", True) is False)


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's marked copy of the tokenizer's template, or None where it has marks itself or TRL has no copy."""
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL has none; or its questions about tools break a template that never saw any
        return None


def _with_written_arguments(turn: Turn) -> Turn:
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in turn.get("tool_calls", [])
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _holds_parsed(text: str, value: str) -> bool:
    """Whether `text` has the keys and values of `value`, a JSON object that a template wrote in its own way."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return False
    parts = (
        [*parsed.keys(), *parsed.values()] if isinstance(parsed, dict) else parsed if isinstance(parsed, list) else []
    )
    return bool(parts) and all(isinstance(part, dict | list) or str(part) in text for part in parts)
