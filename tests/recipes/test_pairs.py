"""Preferences for TRL: pairs that teach nothing are dropped and counted, bad ones named, and TRL reads the rest."""

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from recipes.support.errors import RecipeError
from recipes.support.pairs import choose_prompts, prepare_pairs
from recipes.support.records import Records, load_file
from tests.recipes.test_encoding import CALL, PLAIN, TOOL, WITH_TOOLS

PAIR = {"prompt": "What does the owl eat?", "chosen": " Rodents.", "rejected": " It is a bird."}
ASKED, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
HUMAN = "\n\nHuman: Q\n\nAssistant:"


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def prepared(*rows, tokenizer, template=None, **options):
    if template is not None:
        tokenizer.chat_template = template
    records = Records(Dataset.from_list(list(rows)), "rows")
    return prepare_pairs(records, tokenizer=tokenizer, **{"max_length": 100, **options})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": "Q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": f"{HUMAN} A", "rejected": f"{HUMAN} B"},
    ],
    ids=["explicit", "implicit", "UltraFeedback", "HH"],
)
def test_chats(row, tokenizer):
    (pair,) = prepared(row, tokenizer=tokenizer, template=PLAIN)
    assert pair == {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}


def test_dialogue_without_a_template_stays_text(tokenizer):
    (pair,) = prepared({"chosen": f"{HUMAN} A", "rejected": f"{HUMAN} B"}, tokenizer=tokenizer)
    assert pair == {"prompt": HUMAN, "chosen": " A", "rejected": " B"}


def test_reasoning_that_the_template_leaves_out(tokenizer, capsys):
    """Of a prompt it is said; a completion without it is no completion."""
    row, thought = {"prompt": [ASKED, GOOD, ASKED], "chosen": [GOOD], "rejected": [BAD]}, {**GOOD, "thinking": "Hm."}
    rows = [{**row, "prompt": [ASKED, thought, ASKED]}, {**row, "chosen": [thought]}]
    assert len(prepared(*rows, tokenizer=tokenizer, template=PLAIN)) == 1
    error = capsys.readouterr().err
    assert "in 1 of 2 records of rows the chat template leaves out the reasoning of turns that are not" in error
    assert "1 of 2 records of rows cannot be used: dropped; the first is rows, record 2" in error


def test_what_is_cut_or_teaches_nothing_is_counted(tokenizer, capsys):
    rows = [PAIR, {**PAIR, "prompt": "owl " * 50}, {**PAIR, "rejected": PAIR["chosen"]}]
    rows.append({**PAIR, "chosen": " owl" * 60})
    assert list(prepared(*rows, tokenizer=tokenizer, max_length=20)) == [rows[0], rows[3]]
    error = capsys.readouterr().err
    assert "warning: 2 of 4 pairs of rows are longer than 20 tokens and were cut" in error
    assert "warning: 1 of 4 pairs of rows have no completion token left: dropped" in error
    assert "warning: 1 of 4 pairs of rows have the same completion twice: dropped" in error
    assert len(prepared(*rows, tokenizer=tokenizer, max_length=None)) == 3
    with pytest.raises(RecipeError, match="in none of the 1 pairs do the completions differ within 20 tokens"):
        prepared(rows[2], tokenizer=tokenizer, max_length=20)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**PAIR, "prompt": ""}, "the prompt is empty"),
        ({**PAIR, "rejected": None}, "'rejected' must be text, not None"),
    ],
)
def test_bad_pair_is_dropped_or_named(bad, message, tokenizer, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in (PAIR, PAIR, bad)))
    records = load_file(str(path))
    assert len(prepare_pairs(records, tokenizer=tokenizer, max_length=100)) == 2
    assert f"1 of 3 records of {path} cannot be used: dropped; the first is {path}, line 3: {message}" in (
        capsys.readouterr().err
    )
    with pytest.raises(RecipeError, match=f"x.jsonl, line 3: {message}"):
        prepare_pairs(records, tokenizer=tokenizer, max_length=100, on_bad_record="raise")
    with pytest.raises(RecipeError, match=f"no pair can be used; the first is .*line 3: {message}"):
        prepare_pairs(records.subset([2]), tokenizer=tokenizer, max_length=100)


def test_chats_need_a_template(tokenizer):
    with pytest.raises(RecipeError, match="need a chat template"):
        prepared({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, tokenizer=tokenizer)


def with_calls(text):
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return [turn, {"role": "tool", "content": "sunny", "tool_calls": None}, {"role": "assistant", "content": text}]


def test_tools_reach_trl_or_are_an_error(tokenizer):
    row = {
        "prompt": [ASKED],
        "chosen": with_calls("Sun."),
        "rejected": with_calls("Rain."),
        "tools": json.dumps([TOOL]),
    }
    (pair,) = made = prepared(row, tokenizer=tokenizer, template=WITH_TOOLS)
    assert json.loads(pair["tools"]) == [TOOL]
    (call,) = pair["chosen"][0]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert tokenizer.decode(choose_prompts(made, tokenizer, 3)[0]).startswith("weather")
    with pytest.raises(RecipeError, match="record 1: the chat template leaves out the tool 'weather'"):
        prepared(row, tokenizer=tokenizer, template=PLAIN.replace("turn['content']", "(turn['content'] or '')"))


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_trl_reads_what_was_prepared(kind, tokenizer, tiny_model, tmp_path):
    """The same tokens as here, and none of the pairs dropped."""
    if kind == "text":
        made = prepared(PAIR, {**PAIR, "chosen": " Mice."}, tokenizer=tokenizer)
    else:
        row = {"prompt": [ASKED], "chosen": with_calls("Sun."), "rejected": with_calls("Rain."), "tools": [TOOL]}
        made = prepared(row, row, tokenizer=tokenizer, template=WITH_TOOLS)
    arguments = DPOConfig(str(tmp_path), max_length=100, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        train_dataset=made,
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 2
    first = trainer.train_dataset[0]
    assert first["prompt_ids"] == choose_prompts(made, tokenizer, 1)[0]
    assert tokenizer.decode(first["chosen_ids"]).endswith(f"{'Rodents' if kind == 'text' else 'Sun'}.<|end|>")
