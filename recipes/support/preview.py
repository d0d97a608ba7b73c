"""What a model is about to learn, for people to look at before the first step."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from recipes.support.encoding import IGNORED, Counts, Encoded
from recipes.support.stopping import Verdict

_LONGEST_PIECE, _LONGEST = 240, 1200


def describe(source: str, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, verdict: Verdict) -> str:
    """Return the first record with its targets between [[ and ]], whether it stops, and the counts."""
    lines = [f"first record of {source}, what is learnt between [[ and ]]:", _marked(encoded.dataset[0], tokenizer)]
    if encoded.learns_users:
        lines.append("every token is learnt, those of users too; --assistant_only_loss true: the assistant's alone")
    return "\n".join([*lines, f"stopping: {verdict.text}", _counted(encoded.counts)])


def _marked(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    pairs, text = zip(row["input_ids"], row["labels"], strict=True), ""
    for is_target, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        piece = _shortened(tokenizer.decode([token for token, _ in run]), _LONGEST_PIECE)
        text += f"[[{piece}]]" if is_target else piece
    return _shortened(text, _LONGEST)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def _counted(counts: Counts) -> str:
    lost = {
        "cut": counts.cut,
        "dropped without a target": counts.without_target,
        "dropped as bad": counts.bad,
        "without reasoning that the template leaves out": counts.without_reasoning,
    }
    words = "".join(f", {number:,} {kind}" for kind, number in lost.items() if number)
    return (
        f"{counts.used:,} of {counts.records:,} records with {counts.tokens:,} tokens, of which {counts.targets:,} are"
        f" learnt{words}"
    )
