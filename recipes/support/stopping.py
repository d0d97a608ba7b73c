"""Whether a model that learns from some records will know where to stop."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.support.encoding import IGNORED

_NUM_SAMPLED = 256
# So many of the sampled records must end alike; a few may lack their end.
_SHARE = 0.9


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        text: the finding in one line.
        stops: whether generation will end where answers do, once `added` are set.
        added: tokens at which generation has to end too.
    """

    text: str
    stops: bool
    added: tuple[int, ...] = ()


def judge(
    encoded: Dataset, tokenizer: PreTrainedTokenizerBase, model: Any, *, limit: int | None, packing: bool = False
) -> Verdict:
    """Compare the last target of records with the tokens at which the model's generation ends.

    Args:
        encoded: as `encoding.encode` returns it.
        tokenizer: its tokenizer.
        model: with its configurations.
        limit: the length at which records were cut; those have lost their end.
        packing: whether records follow one another in a row.
    """
    count = min(_NUM_SAMPLED, len(encoded))
    rows = (encoded[index * len(encoded) // count] for index in range(count))
    endings = Counter(_ending(row, tokenizer) for row in rows if limit is None or len(row["input_ids"]) < limit)
    if not endings:
        return Verdict(
            "every record looked at was cut, so none shows where an answer ends (--max_length)", stops=False
        )
    known = ending_ids(model)
    usual, times = max(endings.items(), key=lambda entry: entry[1])
    stopping = sum(number for token, number in endings.items() if token in known)
    total = sum(endings.values())
    name = f"{tokenizer.decode([usual])!r} ({usual})"
    if stopping >= _SHARE * total:
        return Verdict(f"answers end with {name}, where generation ends", stops=True)
    if times >= _SHARE * total and usual in _marks(tokenizer):
        text = f"answers end with {name}, where generation did not end: it is added to eos_token_id for generation"
        return Verdict(text, stops=True, added=(usual,))
    at = ", ".join(repr(tokenizer.decode([token])) for token in sorted(known)) or "no token at all"
    joined = "; packed records run into one another" if packing else ""
    text = (
        f"only {stopping} of {total} answers end where generation ends ({at}), most often they end with {name}: the"
        f" model will write on to its limit{joined}; give a chat template whose last mark is a token, or a tokenizer"
        " with an eos_token"
    )
    return Verdict(text, stops=False)


def ending_ids(model: Any) -> set[int]:
    """Return the tokens at which the model's generation ends."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def let_stop(model: Any, verdict: Verdict) -> None:
    """End generation where the records do: changes `model.generation_config`, which is saved with the model."""
    if verdict.added:
        model.generation_config.eos_token_id = [*sorted(ending_ids(model)), *verdict.added]


def _ending(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the last target that is not white space: templates put a line break behind a mark."""
    targets = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    return next((token for token in reversed(targets) if tokenizer.decode([token]).strip()), targets[-1])


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that no text is spelled with."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
