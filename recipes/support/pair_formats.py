"""How preferences are written, told by their columns, and how they become a prompt and two completions."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recipes.support.errors import RecipeError
from recipes.support.formats import (
    CHATS,
    Format,
    Row,
    announced,
    as_turns,
    beside,
    first_value,
    has_nulls,
    request_of,
    system_turn,
)
from recipes.support.records import Records
from recipes.support.turns import BadRecordError, Turn, read_turns

# Columns that may hold the prompt as text, each with the one that may add to it.
_REQUESTS = (("prompt", None), ("instruction", "input"), ("question", None), ("query", None))
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def recognise_pairs(
    records: Records, columns: Mapping[str, str | None] | None = None, *, has_template: bool
) -> Format:
    """Tell how preferences are written, and say so in a line.

    Args:
        records: as for `recognise`.
        columns: which column to read for `prompt`, `chosen` or `rejected`, where one is given.
        has_template: whether chats can be written; else what is text stays text.

    Raises:
        RecipeError: a column is missing.
    """
    given = {kind: column for kind, column in (columns or {}).items() if column}
    chosen, rejected = given.get("chosen", "chosen"), given.get("rejected", "rejected")
    records.require_columns(("chosen_column", chosen), ("rejected_column", rejected))
    if "prompt" in given:
        records.require_columns(("prompt_column", given["prompt"]))
    answer = first_value(records, chosen)
    prompt, about = _prompt_columns(records, given.get("prompt"), answer)
    if isinstance(answer, list | dict):
        name = "preferences in chats"
    elif prompt is not None:
        name = "preferences in text"
    elif isinstance(answer, str) and answer.startswith(_HUMAN):
        name = "dialogues of Human and Assistant"
    else:
        raise RecipeError(
            f"{records.source} has no column 'prompt' (--prompt_column); its columns are"
            f" {', '.join(records.dataset.column_names)}."
        )
    read = _Pair(
        chosen,
        rejected,
        prompt,
        about,
        nulls=has_nulls(records, chosen),
        has_template=has_template,
        # All records alike, whether or not this one has a system prompt.
        becomes_chat=has_template and (about is not None or "system" in records.dataset.column_names),
    )
    beside = (column for column in (prompt, about, "system") if column in records.dataset.column_names)
    return announced(records, Format(name, (chosen, rejected, *beside), ("prompt", "chosen", "rejected"), read))


def _prompt_columns(records: Records, given: str | None, answer: Any) -> tuple[str | None, str | None]:
    """Return the column of the prompt, and the one that adds to it, if there are such."""
    present = records.dataset.column_names
    for prompt, about in ((given, None), *_REQUESTS):
        if prompt in present:
            return prompt, about if about in present else None
    # Beside whole chats, another one is the chosen chat once more.
    is_whole = False
    with suppress(BadRecordError):  # the record is named later
        is_whole = isinstance(answer, list) and read_turns(answer)[0]["role"] != "assistant"
    return None if is_whole else next((column for column in CHATS if column in present), None), None


@dataclass(frozen=True)
class _Pair:
    """Reads a prompt, a completion that was preferred and one that was not, from the columns it names."""

    chosen: str
    rejected: str
    prompt: str | None
    about: str | None
    nulls: bool
    has_template: bool
    becomes_chat: bool

    def __call__(self, row: Row) -> Row:
        chosen, rejected = row[self.chosen], row[self.rejected]
        asked = row[self.prompt] if self.prompt else None
        if isinstance(chosen, str) and isinstance(rejected, str):
            if asked is None and chosen.startswith(_HUMAN):
                return self._read_dialogue(chosen, rejected)
            if isinstance(asked, str) and not self.becomes_chat:
                system = [row["system"]] if row.get("system") else []
                prompt = "\n\n".join([*system, request_of(row, str(self.prompt), self.about)])
                return _checked(prompt, chosen, rejected)
        answers = [
            as_turns([value] if isinstance(value, dict) else value, "assistant", column, nulls=self.nulls)
            for value, column in ((chosen, self.chosen), (rejected, self.rejected))
        ]
        return {**self._split(row, asked, *answers), **beside(row, nulls=self.nulls)}

    def _split(self, row: Row, asked: Any, chosen: list[Turn], rejected: list[Turn]) -> Row:
        """Tell the prompt from the completions, whether it is given, or both chats begin with it, or both."""
        shared = _shared_turns(chosen, rejected)
        if shared and not isinstance(asked, list):
            prompt = chosen[:shared]  # what stands in `prompt` beside whole chats is their first request
        elif asked is None:
            raise BadRecordError("there is no prompt: give one, or two chats that begin with the same turns.")
        else:
            asked = asked if isinstance(asked, list) else request_of(row, str(self.prompt), self.about)
            prompt = as_turns(asked, "user", str(self.prompt), nulls=self.nulls)
            is_repeated = all(answer[: len(prompt)] == prompt for answer in (chosen, rejected))
            shared = len(prompt) if is_repeated else 0
        return _checked(system_turn(row, prompt) + prompt, chosen[shared:], rejected[shared:])

    def _read_dialogue(self, chosen: str, rejected: str) -> Row:
        """Split what was written as one text at its marks; all but the last answer is the prompt."""
        prompts, answers = zip(*(text.rpartition(_ASSISTANT)[::2] for text in (chosen, rejected)), strict=True)
        if prompts[0] != prompts[1] or not prompts[0]:
            raise BadRecordError("the two dialogues must be the same up to the last answer.")
        if not self.has_template:
            return _checked(prompts[0] + _ASSISTANT, *answers)
        turns = []
        for part in prompts[0].split(_HUMAN)[1:]:
            asked, *replies = part.split(_ASSISTANT)
            turns.append({"role": "user", "content": asked.strip()})
            turns += [{"role": "assistant", "content": reply.strip()} for reply in replies]
        return _checked(turns, *([{"role": "assistant", "content": answer.strip()}] for answer in answers))


def _checked(prompt: Any, chosen: Any, rejected: Any) -> Row:
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise BadRecordError("the prompt is empty.")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared_turns(first: list[Turn], second: list[Turn]) -> int:
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return shared
