"""What of a chat its template carries into the text: a word is put into every part, and is looked for."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from recipes.support.turns import Turn

# No text has it, and no template spells it otherwise.
WORD = "zqxjkvbw"
_REASONING = ("reasoning_content", "reasoning", "thinking")
_END_OF_THOUGHT = "</think>"


class Part(NamedTuple):
    """A part of a turn: which turn, whether it is its content, its reasoning or a call, and its text."""

    turn: int
    kind: str
    text: str


def find_lost(render: Callable[[list[Turn]], str], turns: list[Turn]) -> list[Part]:
    """Return the parts that `render` leaves out; what tools returned is not looked at, templates write that anew."""
    marked, parts = [], []
    for index, turn in enumerate(turns):
        edited = dict(turn)
        for kind, text, keep in _parts_of(turn, edited) if turn["role"] != "tool" else ():
            keep(f"{WORD}{len(parts)}x")
            parts.append(Part(index, kind, text))
        marked.append(edited)
    rendered = render(marked) if parts else ""
    return [part for number, part in enumerate(parts) if f"{WORD}{number}x" not in rendered]


def with_word(call: Turn, word: str = WORD) -> Turn:
    """Return a call of a tool with the word as its last argument."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": {**function["arguments"], word: word}}}


def _parts_of(turn: Turn, edited: Turn) -> Iterator[tuple[str, str, Callable[[str], None]]]:
    """Yield each part of a turn that is not empty, with what puts a word into it in `edited`."""
    if thoughts := [name for name in _REASONING if isinstance(turn.get(name), str) and turn[name].strip()]:
        # The same thought may stand under several names: one is enough.
        yield (
            "reasoning",
            turn[thoughts[0]],
            lambda word: edited.update({name: turn[name] + word for name in thoughts}),
        )
    content = turn.get("content") or ""
    thought, end, answer = content.rpartition(_END_OF_THOUGHT) if turn["role"] == "assistant" else ("", "", content)
    pieces = {"reasoning": thought, "content": answer}

    def write(kind: str, word: str) -> None:
        # In the middle: how a text begins and ends may mean something to the template.
        middle = len(thought) if kind == "reasoning" else len(answer) // 2
        pieces[kind] = pieces[kind][:middle] + word + pieces[kind][middle:]
        edited["content"] = pieces["reasoning"] + end + pieces["content"]

    if thought.replace("<think>", "").strip():
        yield "reasoning", thought, lambda word: write("reasoning", word)
    if answer.strip():
        yield "content", answer, lambda word: write("content", word)
    calls = list(turn.get("tool_calls") or [])
    for index, call in enumerate(calls):

        def mark(word: str, index: int = index) -> None:
            calls[index] = with_word(calls[index], word)
            edited["tool_calls"] = calls

        yield "call", call["function"]["name"], mark
