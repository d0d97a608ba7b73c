"""Records for supervised fine-tuning: what is a target, what is counted, and how a bad one is answered (row 25)."""

import json
import re

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from recipes.support.arguments import SftDataArguments
from recipes.support.chat import load_template
from recipes.support.completion import IGNORED, encode_records
from recipes.support.errors import RecipeError
from recipes.support.records import Records, load_file

GENERATION_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ':' }}{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ turn['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ':' + turn['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
FORGETFUL_TEMPLATE = "{{ messages|length }}" + PLAIN_TEMPLATE
CHAT = [
    {"role": "user", "content": "What does the owl eat?"},
    {"role": "assistant", "content": "The owl eats rodents."},
    {"role": "user", "content": "And the goat?"},
    {"role": "assistant", "content": "The goat eats grass."},
]
PAIR = {"prompt": "What does the owl eat?", "completion": " The owl eats rodents."}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def encode(rows, tokenizer, **options):
    records = Records(Dataset.from_list(rows), "rows")
    return encode_records(records, SftDataArguments(**options), tokenizer, context_length=128)


def targets(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_loss_is_on_the_completion_only(tokenizer):
    (row,) = encode([PAIR], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == PAIR["prompt"] + PAIR["completion"] + tokenizer.eos_token
    assert targets(row, tokenizer) == PAIR["completion"] + tokenizer.eos_token
    assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_loss_is_on_all_of_a_text(tokenizer):
    (row,) = encode([{"text": "The owl eats rodents."}], tokenizer)
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("template", [GENERATION_TEMPLATE, PLAIN_TEMPLATE], ids=["marked", "by prefixes"])
def test_loss_is_on_the_assistant_only(template, tokenizer):
    tokenizer.chat_template = template
    (row,) = encode([{"messages": CHAT}], tokenizer)
    eos = tokenizer.eos_token
    assert targets(row, tokenizer) == f"The owl eats rodents.{eos}The goat eats grass.{eos}"


def test_loss_is_on_every_turn_if_asked_for(tokenizer):
    tokenizer.chat_template = PLAIN_TEMPLATE
    (row,) = encode([{"messages": CHAT}], tokenizer, assistant_only_loss=False)
    assert row["labels"] == row["input_ids"]


def test_option_for_chats_without_chats_is_a_warning(tokenizer, capsys):
    encode([PAIR], tokenizer, assistant_only_loss=True)
    assert "assistant_only_loss and chat_template are without effect" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_template_by_name_marks_the_assistant(name, tiny_model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    load_template(name, tokenizer)
    assert ("spelled in pieces" in capsys.readouterr().err) == (name == "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = load_template(name, tokenizer)
    assert capsys.readouterr().err == ""
    (row,) = encode([{"messages": CHAT}], tokenizer)
    end = "<|im_end|>" if name == "chatml" else tokenizer.eos_token
    space = "" if name == "chatml" else " "
    assert targets(row, tokenizer) == f"{space}The owl eats rodents.{end}{space}The goat eats grass.{end}"
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False).startswith(prompt)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not one of chatml, plain"), ("", "the file is empty"), ("a\n{% for %}", "line 2: no Jinja template")],
)
def test_bad_template_is_named(content, message, tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_template(str(path), tokenizer)


@pytest.mark.long
def test_template_is_saved_with_the_result(sft, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *([{"messages": CHAT}] * 8))
    (tmp_path / "mine.jinja").write_text(GENERATION_TEMPLATE)
    status, _, error = sft("--train_file", path, "--chat_template", tmp_path / "mine.jinja")
    assert status == 0, error
    assert AutoTokenizer.from_pretrained(sft.output_dir).chat_template == GENERATION_TEMPLATE


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    with pytest.raises(RecipeError, match="rows, record 1: the chat template rewrites turns"):
        encode([{"messages": CHAT}], tokenizer)


def test_other_columns_by_flag(tokenizer):
    rows = [{"question": "Why?", "answer": " Because.", "text": "no"}]
    (row,) = encode(rows, tokenizer, prompt_column="question", completion_column="answer")
    assert targets(row, tokenizer) == " Because." + tokenizer.eos_token


def test_what_is_cut_or_left_without_a_target_is_counted(tokenizer, capsys):
    rows = [PAIR, {"prompt": "word " * 50, "completion": " lost"}, {"prompt": "Q", "completion": ""}]
    rows.append({"prompt": "Q", "completion": " word" * 60})
    encoded = encode(rows, tokenizer, max_length=20)
    assert len(encoded) == 2
    assert max(map(len, encoded["input_ids"])) == 20
    error = capsys.readouterr().err
    assert "warning: 2 of 4 records of rows are longer than 20 tokens and were cut" in error
    assert "warning: 2 of 4 records of rows have no completion token left: dropped" in error


def test_context_of_the_model_limits_the_length(tokenizer, capsys):
    (row,) = encode([{"text": "owl " * 300}], tokenizer, max_length=1000)
    assert len(row["input_ids"]) == 128
    assert "1 of 1 records of rows are longer than 128 tokens" in capsys.readouterr().err


GOOD = {"prompt": "a", "completion": " b"}
BAD_FILES = {
    "empty file": ("x.jsonl", "", "x.jsonl is empty"),
    "no records": ("x.jsonl", "\n\n", "x.jsonl"),
    "unknown ending": ("x.txt", "hello", "the format is told by the ending"),
    "broken json": ("x.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', "x.jsonl, line 3: not JSON"),
    "not an object": ("x.jsonl", '{"text": "a"}\n[1]\n', "x.jsonl, line 2: must be an object, not list"),
    "type changes": ("x.jsonl", '{"text": "a"}\n{"text": 1}\n', "x.jsonl, line 2: 'text' is of type int"),
    "null completion": (
        "x.jsonl",
        json.dumps(GOOD) + "\n\n" + '{"prompt": "a", "completion": null}\n',
        "x.jsonl, line 3: the completion must be text, not None",
    ),
    "missing in csv": ("x.csv", 'prompt,completion\na,"b\nb"\nc\n', "x.csv, line 4: the completion must be text"),
    "unknown columns": ("x.jsonl", '{"input": "a", "output": "b"}\n', "its columns are input, output"),
    "no target at all": ("x.jsonl", '{"prompt": "a", "completion": ""}\n' * 3, "has a completion token within"),
    "no chat template": ("x.jsonl", json.dumps({"messages": CHAT}) + "\n", "need a chat template"),
    "message without content": ("x.jsonl", '{"messages": [{"role": "user"}]}\n', "x.jsonl, line 1: the content"),
    "not parquet": ("x.parquet", "hello", "x.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_one_clear_error_before_anything_is_written(name, content, message, sft, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    status, _, error = sft("--train_file", path, "--validation_file", path)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in error
    assert not sft.output_dir.exists()


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_text_that_looks_like_a_date_stays_text(suffix, tmp_path):
    rows = [{"prompt": "When?", "completion": "2021-03-14"}, {"prompt": "And?", "completion": "2021-03-15T10:00:00"}]
    path = tmp_path / f"x.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "\n\n".join(map(json.dumps, rows)))
    assert list(load_file(str(path)).dataset) == rows


def test_line_number_survives_holding_out_and_drawing(sft, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *([GOOD] * 20), {"prompt": "a", "completion": None}, *([GOOD] * 9))
    status, _, error = sft("--train_file", path, "--validation_fraction", "0.2", "--seed", "1")
    assert status == 1
    assert "x.jsonl, line 21: the completion must be text" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--dataset_name", "nobody/nothing"], "dataset 'nobody/nothing' cannot be loaded"),
        (["--dataset_name", "demo", "--text_column", "body"], "has no column 'body' (--text_column)"),
        ([], "no training data: give --train_file"),
    ],
)
def test_data_that_was_named_is_never_replaced(flags, message, sft):
    status, _, error = sft(*flags)
    assert status == 1
    assert re.search(rf"^error: .*{re.escape(message)}", error, re.MULTILINE)
    assert not sft.output_dir.exists()


def test_model_that_was_named_is_never_replaced(sft):
    status, _, error = sft("--dataset_name", "demo", model="nobody/nothing")
    assert status == 1
    assert "model 'nobody/nothing' cannot be loaded" in error
    assert "give the folder of a downloaded model" in error
    assert not sft.output_dir.exists()


def test_data_alone_does_not_bring_the_demo_model(sft, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *([GOOD] * 4))
    status, _, error = sft("--train_file", path, model=None)
    assert status == 1
    assert "no model: data was named" in error


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_trains(suffix, sft, tmp_path):
    dataset = Dataset.from_list([PAIR] * 12)
    path = tmp_path / f"x.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(list(dataset)))
    else:
        {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[suffix](str(path))
    status, output, error = sft("--train_file", path)
    assert status == 0, error
    assert "AdaTAMW" in output
    assert (sft.output_dir / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_full_fine_tuning_saves_the_whole_model(sft):
    status, output, error = sft("--dataset_name", "demo", "--full", "--optim", "adamw_torch")
    assert status == 0, error
    assert "AdamW" in output
    assert (sft.output_dir / "model.safetensors").is_file()
    results = json.loads((sft.output_dir / "results.json").read_text())
    assert "damping_mean" not in results


def test_layers_that_do_not_exist_are_named(sft):
    status, _, error = sft("--dataset_name", "demo", "--lora_target_modules", "wrong_proj")
    assert status == 1
    assert "lora_target_modules = wrong_proj" in error
