"""Before training: will it stop, and what is learnt."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.support.chat import load_template
from recipes.support.encoding import encode
from recipes.support.preview import describe
from recipes.support.records import Records
from recipes.support.stopping import ending_ids, judge, let_stop

CHAT = [
    {"role": "user", "content": "What does the owl eat?"},
    {"role": "assistant", "content": "The owl eats rodents."},
]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def encoded(rows, tokenizer, **options):
    return encode(Records(Dataset.from_list(rows), "rows"), tokenizer=tokenizer, **{"max_length": 512, **options})


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": " b"}, {"text": "The owl"}, {"messages": CHAT}], ids=["pair", "text", "chat"]
)
def test_what_ends_with_the_end_of_text_stops(row, model, tokenizer):
    tokenizer.chat_template = load_template("plain", tokenizer)
    verdict = judge(encoded([row], tokenizer).dataset, tokenizer, model, limit=512)
    assert verdict.stops
    assert verdict.text == "answers end with '<|end|>' (1), where generation ends"
    let_stop(model, verdict)
    assert ending_ids(model) == {tokenizer.eos_token_id}


@pytest.mark.parametrize("assistant_only", [True, False])
def test_mark_of_a_template_is_added(assistant_only, model, tokenizer):
    """A base model ends at its own token, chatml at another; white space behind the mark does not count."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = load_template("chatml", tokenizer)
    made = encoded([{"messages": CHAT}], tokenizer, assistant_only_loss=assistant_only)
    verdict = judge(made.dataset, tokenizer, model, limit=512)
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (verdict.stops, verdict.added) == (True, (mark,))
    assert "'<|im_end|>'" in verdict.text
    let_stop(model, verdict)
    assert ending_ids(model) == {tokenizer.eos_token_id, mark}
    assert judge(made.dataset, tokenizer, model, limit=512).added == ()


def test_mark_that_is_spelled_in_pieces_is_warned_of(model, tokenizer):
    tokenizer.chat_template = load_template("chatml", tokenizer)
    verdict = judge(encoded([{"messages": CHAT}], tokenizer).dataset, tokenizer, model, limit=512)
    assert (verdict.stops, verdict.added) == (False, ())
    assert "only 0 of 1 answers end where generation ends ('<|end|>')" in verdict.text


def test_packing_without_an_end_is_warned_of(model, tokenizer):
    tokenizer.eos_token = None
    made = encoded([{"text": "The owl eats rodents."}], tokenizer)
    verdict = judge(made.dataset, tokenizer, model, limit=512, packing=True)
    assert not verdict.stops
    assert "packed records run into one another" in verdict.text
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert "(no token at all)" in judge(made.dataset, tokenizer, model, limit=512).text


def test_records_that_were_cut_say_nothing(model, tokenizer):
    rows = [{"prompt": "a", "completion": " b"}] + [{"prompt": "a", "completion": " b" * 60}] * 9
    made = encoded(rows, tokenizer, max_length=20)
    assert judge(made.dataset, tokenizer, model, limit=20).stops
    only_cut = judge(made.dataset.select(range(1, 10)), tokenizer, model, limit=20)
    assert not only_cut.stops
    assert "every record looked at was cut" in only_cut.text


def test_preview_marks_the_targets_and_counts(model, tokenizer):
    tokenizer.chat_template = load_template("plain", tokenizer)
    made = encoded([{"messages": CHAT}, {"messages": []}], tokenizer, assistant_only_loss=True)
    shown = describe("rows", made, tokenizer, judge(made.dataset, tokenizer, model, limit=512))
    assert "[[ The owl eats rodents.<|end|>]]" in shown
    assert "stopping: answers end with '<|end|>' (1), where generation ends" in shown
    assert f"1 of 2 records with {made.counts.tokens} tokens, of which {made.counts.targets} are learnt" in shown
    assert shown.endswith(", 1 dropped as bad")


def test_preview_is_short(model, tokenizer):
    tokenizer.chat_template = load_template("plain", tokenizer)
    chat = [{**turn, "content": turn["content"] * 100} for turn in CHAT * 20]
    made = encoded([{"messages": chat}], tokenizer, assistant_only_loss=True, max_length=None)
    shown = describe("rows", made, tokenizer, judge(made.dataset, tokenizer, model, limit=None))
    assert len(shown) < 2000
