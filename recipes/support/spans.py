"""Where in a rendered chat the assistant's turns begin and end, for templates that do not mark them.

A word is put at the end of a turn. What follows it belongs to the turn as far as the same follows where the chat ends
with that turn; so the turn is found whole, whatever marks stand in it, and though a template rewrites earlier turns.
"""

import re
from collections.abc import Callable, Iterable
from itertools import takewhile

from recipes.support.carried import WORD, with_word
from recipes.support.turns import BadRecordError, Turn

_OPENING: Turn = {"role": "user", "content": "a"}


class SpanFinder:
    """Finds the assistant's turns in the text of a chat."""

    def __init__(self, render: Callable[[list[Turn], bool], str], marks: Iterable[str]) -> None:
        """Take how chats are rendered, with or without what begins an answer, and the texts of special tokens."""
        self._render = render
        # Marks are compared whole: <|end|> and <|return|> have nothing in common.
        whole = sorted(filter(None, marks), key=len, reverse=True)
        self._pieces = re.compile("|".join([*map(re.escape, whole), "."]), re.DOTALL)

    def find(self, text: str, turns: list[Turn]) -> list[tuple[int, int]]:
        """Return where each of the assistant's turns begins, after what is given, and where it ends.

        Args:
            text: the whole chat, rendered.
            turns: of the chat, which may begin with the assistant.

        Raises:
            BadRecordError: a turn's borders cannot be told.
        """
        turns = [_OPENING, *turns] if turns[0]["role"] == "assistant" else turns
        spans, last = [], len(turns) - 1
        for index in (index for index, turn in enumerate(turns) if turn["role"] == "assistant"):
            begin = self._border(text, turns, index - 1, prompt=True)
            end = self._border(text, turns, index, prompt=False) if index < last else len(text)
            if not (spans[-1][1] if spans else 0) <= begin < end:
                raise _untold()
            spans.append((begin, end))
        return spans

    def _border(self, text: str, turns: list[Turn], index: int, *, prompt: bool) -> int:
        """Return where the turn at `index` ends in `text`, or with `prompt`, the header of the answer to it."""
        marked = [*turns[:index], _with_word(turns[index]), *turns[index + 1 :]]
        whole, part = (
            self._after_word(self._render(some, asked))
            for some, asked in ((marked, False), (marked[: index + 1], prompt))
        )
        pieces = list(self._pieces.findall(whole))
        common = "".join(
            piece for piece, _ in takewhile(_alike, zip(pieces, self._pieces.findall(part), strict=False))
        )
        if not common and not prompt and pieces and len(pieces[0]) > 1:
            # The last turn ends with another mark than earlier ones, or with none: these, with what begins the next.
            common = pieces[0]
        if part and not common:
            raise _untold()
        following = whole[len(common) :]
        if not text.endswith(following):
            raise _untold()
        return len(text) - len(following)

    def _after_word(self, text: str) -> str:
        _, word, after = text.rpartition(WORD)
        if not word:
            raise _untold()
        return after


def _alike(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


def _with_word(turn: Turn) -> Turn:
    """Return a turn that ends with the word: in the arguments of its calls, where it has any."""
    if calls := turn.get("tool_calls"):
        return {**turn, "tool_calls": [with_word(call) for call in calls]}
    return {**turn, "content": turn["content"] + WORD}


def _untold() -> BadRecordError:
    return BadRecordError(
        "the chat template rewrites earlier turns, so that the assistant's tokens cannot be told apart; give the"
        " tokenizer a template with {% generation %}, or records of prompt and completion."
    )
