"""Records as people have them are told by their columns, and become what TRL reads; nothing of them is lost."""

import json

import pytest
from datasets import Dataset, Features, Json, Value

from recipes.support.errors import RecipeError
from recipes.support.formats import recognise
from recipes.support.pair_formats import recognise_pairs
from recipes.support.records import Records
from recipes.support.turns import BadRecordError

ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
OTHER = {"role": "assistant", "content": "Hu"}
SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
EXTRA = {"tools": None, "chat_template_kwargs": {}}


def records_of(*rows, nested=True):
    """Nested values as JSON, as files are read, or as the columns of a table."""
    if not nested:
        return Records(Dataset.from_list(list(rows)), "rows")
    names = dict.fromkeys(name for row in rows for name in row)
    kinds = {name: next((row[name] for row in rows if row.get(name) is not None), None) for name in names}
    features = {name: Json() if isinstance(kind, list | dict) else Value("string") for name, kind in kinds.items()}
    return Records(Dataset.from_list(list(rows), features=Features(features)), "rows")


def converted(*rows, columns=None, nested=True):
    records = records_of(*rows, nested=nested)
    found = recognise(records, columns)
    return [found.convert(row) for row in records.dataset]


def turn(role, content):
    return {"from": role, "value": content}


CHATS = {
    "messages": {"messages": [ASKED, ANSWER]},
    "as JSON": {"messages": json.dumps([ASKED, ANSWER])},
    "ShareGPT": {"conversations": [turn("human", "Hi"), turn("gpt", "Ho")]},
    "ShareGPT with other names": {"conversation": [turn("user", "Hi"), turn("assistant", "Ho")]},
    "conversations of roles": {"conversations": [ASKED, ANSWER]},
    "a list for each key": {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}},
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            ANSWER,
        ]
    },
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_chats(row):
    assert converted(row) == [{"messages": [ASKED, ANSWER], **EXTRA}]


def test_system_prompt_in_its_own_column_comes_first_but_once():
    with_system = [turn("system", "Be kind."), turn("human", "Hi"), turn("gpt", "Ho")]
    rows = [{"conversations": with_system[1:], "system": "Be kind."}, {"conversations": with_system, "system": "No."}]
    assert [row["messages"] for row in converted(*rows)] == [[SYSTEM, ASKED, ANSWER]] * 2


CALLS = {
    "of OpenAI": {"role": "assistant", "content": None, "tool_calls": [{"id": "7", **CALL}]},
    "with JSON": {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "7", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
    },
    "flat": {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
    "of old": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
    },
    "of ShareGPT": turn("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
}


@pytest.mark.parametrize("nested", [True, False], ids=["JSON", "table"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_of_tools(call, nested):
    asked = turn("human", "Hi") if "from" in call else ASKED
    row = {"messages": [asked, call], "tools": json.dumps([TOOL["function"]])}
    (read,) = converted(row, nested=nested)
    assert read["tools"] == [TOOL]
    (found,) = read["messages"][1].pop("tool_calls")
    assert found.pop("id", "7") == "7"
    assert found == CALL
    assert read["messages"] == [ASKED, {"role": "assistant", "content": None}]


def test_keys_that_a_table_fills_up_are_no_arguments():
    rows = [
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]}
        for arguments in ({"a": "1"}, {"b": "2"})
    ]
    read = converted(*rows, nested=False)
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in read] == [{"a": "1"}, {"b": "2"}]


def test_null_that_was_written_is_an_argument():
    call = {"name": "f", "arguments": {"a": None}}
    (row,) = converted({"messages": [ASKED, {"role": "assistant", "tool_calls": [call]}]})
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_what_a_tool_returned_may_be_an_object():
    row = {"messages": [ASKED, {"role": "tool", "content": {"temperature": 20.5}}]}
    assert converted(row)[0]["messages"][1] == {"role": "tool", "content": '{"temperature": 20.5}'}


INSTRUCTIONS = {
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Ho"}, "Hi"),
    "Alpaca with input": ({"instruction": "Add", "input": "1 and 2", "output": "Ho", "text": "all"}, "Add\n\n1 and 2"),
    "without input": ({"instruction": "Hi", "output": "Ho"}, "Hi"),
    "Dolly": ({"instruction": "Hi", "context": "There", "response": "Ho", "category": "talk"}, "Hi\n\nThere"),
    "question and answer": ({"question": "Hi", "answer": "Ho"}, "Hi"),
}


@pytest.mark.parametrize(("row", "request_"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_instructions_become_a_chat(row, request_):
    assert converted(row) == [{"prompt": [{"role": "user", "content": request_}], "completion": [ANSWER], **EXTRA}]


def test_instruction_with_system_prompt_and_history():
    row = {"instruction": "Hi", "output": "Ho", "system": "Be kind.", "history": [["One", "Two"]]}
    (read,) = converted(row)
    assert read["prompt"] == [
        SYSTEM, {"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}, ASKED
    ]  # fmt: skip


def test_prompts_and_completions():
    assert converted({"prompt": "Hi", "completion": "Ho"}) == [{"prompt": "Hi", "completion": "Ho"}]
    assert converted({"prompt": [ASKED], "completion": [ANSWER]}) == [
        {"prompt": [ASKED], "completion": [ANSWER], **EXTRA}
    ]
    assert converted({"prompt": [ASKED], "completion": "Ho"})[0]["completion"] == [ANSWER]
    assert converted({"text": "Hi"}) == [{"text": "Hi"}]


def test_column_that_is_given_decides():
    row = {"messages": [ASKED, ANSWER], "prompt": "a", "completion": "b", "answer": "c", "body": "d"}
    assert converted(row, columns={"completion": "answer"}) == [{"prompt": "a", "completion": "c"}]
    assert converted(row, columns={"text": "body"}) == [{"text": "d"}]
    # TRL's default is no choice.
    assert converted(row, columns={"text": "text", "messages": None})[0]["messages"] == [ASKED, ANSWER]
    with pytest.raises(RecipeError, match=r"has no column 'chat' \(--messages_column\)"):
        converted(row, columns={"messages": "chat"})
    with pytest.raises(RecipeError, match=r"has no column 'body' \(--dataset_text_field\)"):
        converted({"text": "a"}, columns={"text": "body"})


def test_format_is_named_and_columns_that_are_not_used_are_warned_of(capsys):
    converted({"instruction": "a", "output": "b", "source": "x", "id": "1", "text": "all"})
    shown = capsys.readouterr()
    assert shown.out == "rows: Alpaca (instruction, output) -> prompt, completion\n"
    assert shown.err == "warning: rows: columns that are not used: source, text\n"
    converted({"conversations": [turn("human", "Hi")], "tools": "[]"})
    shown = capsys.readouterr()
    assert shown.out == "rows: ShareGPT conversations (conversations) -> messages\n"
    assert shown.err == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "output": "b"}, "its columns are input, output. Name yours: --prompt_column"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "holds preferences .* data for dpo.py"),
    ],
)
def test_unknown_columns_are_an_error(row, message):
    with pytest.raises(RecipeError, match=message):
        converted(row)


def test_labels_of_good_and_bad_completions_are_an_error():
    records = Records(Dataset.from_list([{"prompt": "a", "completion": "b", "label": False}]), "rows")
    with pytest.raises(RecipeError, match="told by 'label': that is data for KTO"):
        recognise(records)
    assert recognise(records, {"prompt": "prompt"}).becomes == ("prompt", "completion")


def test_pictures_that_are_not_used_are_warned_of(capsys):
    converted({"messages": [ASKED, ANSWER], "images": ["a.png"]})
    assert "columns that are not used: images" in capsys.readouterr().err


BAD = {
    "no turns": ({"messages": []}, "at least one message"),
    "no role": ({"messages": [{"content": "Hi"}]}, "must have a 'role' and a 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "content of a message must be text"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "a part of type 'image': only text",
    ),
    "call without a name": ({"messages": [{**ANSWER, "tool_calls": [{"arguments": {}}]}]}, "must have a name"),
    "broken arguments": (
        {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}]},
        "not JSON",
    ),
    "broken tools": ({"messages": [ASKED], "tools": '{"name": "f"}'}, "'tools' must be a list"),
    "null": ({"prompt": "a", "completion": None}, "the completion must be text, not None"),
    "null instruction": ({"instruction": "a", "output": None}, "'output' must be text"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_bad_record_says_why(row, message):
    with pytest.raises(BadRecordError, match=message):
        converted(row)


def pairs(row, *, has_template=True, columns=None):
    records = records_of(row)
    found = recognise_pairs(records, columns, has_template=has_template)
    return found.convert(records.dataset[0])


CHAT_PAIR = {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER], **EXTRA}
HUMAN = "\n\nHuman: Hi\n\nAssistant:"
PAIRS = {
    "explicit": {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]},
    "explicit and repeated": {"prompt": [ASKED], "chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
    "implicit": {"chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
    "UltraFeedback": {"prompt": "Hi", "chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
    "UltraFeedback, whole": {
        "prompt": "Hi",
        "messages": [ASKED, ANSWER],
        "chosen": [ASKED, ANSWER],
        "rejected": [ASKED, OTHER],
    },
    "whole chats": {"messages": [ASKED, ANSWER], "chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
    "prompt as text": {"prompt": "Hi", "chosen": [ANSWER], "rejected": [OTHER]},
    "completions as text": {"prompt": [ASKED], "chosen": "Ho", "rejected": "Hu"},
    "ShareGPT": {"conversations": [turn("human", "Hi")], "chosen": turn("gpt", "Ho"), "rejected": turn("gpt", "Hu")},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_preferences_in_chats(row):
    assert pairs(row) == CHAT_PAIR


def test_preferences_in_text():
    row = {"prompt": "Hi", "chosen": "Ho", "rejected": "Hu"}
    assert pairs(row) == row
    named = {"question": "Hi", "good": "Ho", "bad": "Hu"}
    assert pairs(named, columns={"chosen": "good", "rejected": "bad"}) == row
    alpaca = {"instruction": "Add", "input": "1 and 2", "chosen": "Ho", "rejected": "Hu"}
    assert pairs(alpaca, has_template=False)["prompt"] == "Add\n\n1 and 2"
    assert pairs({**named, "system": "Be kind."}, columns={"chosen": "good", "rejected": "bad"})["prompt"] == [
        SYSTEM,
        ASKED,
    ]


def test_system_prompt_that_only_some_records_have():
    rows = [{"system": system, "question": "Hi", "chosen": "Ho", "rejected": "Hu"} for system in ("", "Be kind.")]
    for has_template, prompts in ((True, [[ASKED], [SYSTEM, ASKED]]), (False, ["Hi", "Be kind.\n\nHi"])):
        records = records_of(*rows)
        found = recognise_pairs(records, has_template=has_template)
        assert [found.convert(row)["prompt"] for row in records.dataset] == prompts


def test_dialogues_of_human_and_assistant():
    row = {"chosen": f"{HUMAN} Ho", "rejected": f"{HUMAN} Hu"}
    assert pairs(row, has_template=False) == {"prompt": HUMAN, "chosen": " Ho", "rejected": " Hu"}
    assert pairs(row) == {name: CHAT_PAIR[name] for name in ("prompt", "chosen", "rejected")}
    longer = {name: f"{HUMAN} A\n\nHuman: B{text[len(HUMAN) - 12 :]}" for name, text in row.items()}
    assert [each["role"] for each in pairs(longer)["prompt"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "there is no prompt"),
        (
            {"chosen": f"{HUMAN} a", "rejected": "\n\nHuman: b\n\nAssistant: c"},
            "must be the same up to the last answer",
        ),
    ],
)
def test_pair_without_a_prompt_says_so(row, message):
    with pytest.raises(BadRecordError, match=message):
        pairs(row)


def test_preferences_without_a_column_are_an_error():
    for row, message in (
        ({"prompt": "a", "chosen": "b"}, r"has no column 'rejected' \(--rejected_column\)"),
        ({"chosen": "b", "rejected": "c"}, r"has no column 'prompt' \(--prompt_column\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            pairs(row)
