"""Records for supervised fine-tuning: what is a target, what is counted, and how a bad one is answered (row 25)."""

import json
import re
import shutil

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from recipes.support import encoding
from recipes.support.chat import load_template
from recipes.support.encoding import IGNORED
from recipes.support.errors import RecipeError
from recipes.support.records import Records

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
    return encoding.encode(records, tokenizer=tokenizer, max_length=128, **options).dataset


def targets(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_template_by_name_marks_the_assistant(name, tiny_model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    load_template(name, tokenizer)
    assert ("spelled in pieces" in capsys.readouterr().err) == (name == "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = load_template(name, tokenizer)
    assert capsys.readouterr().err == ""
    (row,) = encode([{"messages": CHAT}], tokenizer, assistant_only_loss=True)
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
    status, output, error = sft("--train_file", path, "--chat_template_path", tmp_path / "mine.jinja")
    assert status == 0, error
    assert AutoTokenizer.from_pretrained(sft.output_dir).chat_template == GENERATION_TEMPLATE
    assert "every token is learnt, those of users too; --assistant_only_loss true" in output


def test_template_of_another_tokenizer(tiny_model, tmp_path):
    tokenizer, other = (AutoTokenizer.from_pretrained(tiny_model) for _ in range(2))
    other.chat_template = PLAIN_TEMPLATE
    other.save_pretrained(tmp_path)
    assert load_template(str(tmp_path), tokenizer) == PLAIN_TEMPLATE
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "<|turn|>" + PLAIN_TEMPLATE
    other.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"made of tokens that the model has no embedding for \(<\|turn\|>\)"):
        load_template(str(tmp_path), tokenizer)


def changed_tokenizer(sft, folder, change):
    tokenizer = AutoTokenizer.from_pretrained(sft.model)
    change(tokenizer)
    shutil.copytree(sft.model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizer_without_an_end_and_padding(sft, tmp_path):
    def take_away(tokenizer):
        tokenizer.eos_token = tokenizer.pad_token = None

    folder = changed_tokenizer(sft, tmp_path / "model", take_away)
    status, _, error = sft("--dataset_name", "demo", model=folder)
    assert status == 1
    assert "neither a token for padding nor one for the end of a text: name one by --eos_token" in error
    assert not sft.output_dir.exists()
    status, _, error = sft("--dataset_name=demo", "--eos_token=<|end|>", "--max_steps=1", model=folder)
    assert status == 0, error


def test_tokenizer_that_is_larger_than_the_embedding(sft, tmp_path):
    folder = changed_tokenizer(sft, tmp_path / "model", lambda tokenizer: tokenizer.add_tokens(["<tool>"]))
    path = write_lines(tmp_path / "x.jsonl", *([{"prompt": "a", "completion": " <tool>"}] * 8))
    status, _, error = sft("--train_file", path, model=folder)
    assert status == 1
    assert re.search(r"the tokenizer makes token \d+ \('<tool>'\), and the model has \d+ embeddings", error)
    assert not sft.output_dir.exists()


@pytest.mark.long
def test_end_that_was_added_is_saved_beside_the_adapter_and_merged(sft, tmp_path):
    """A mark that the model's generation did not end at."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(sft.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(sft.model)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "x.jsonl", *([{"messages": CHAT}] * 8))
    words = ["--train_file", path, "--chat_template_path=chatml", "--assistant_only_loss", "--merge"]
    status, output, error = sft(*words, model=tmp_path / "model")
    assert status == 0, error
    assert "where generation did not end: it is added to eos_token_id" in output
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for folder in (sft.output_dir, sft.output_dir / "merged"):
        assert end in GenerationConfig.from_pretrained(folder).eos_token_id


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
    "not parquet": ("x.parquet", "hello", "x.parquet cannot be read as parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_one_clear_error_before_anything_is_written(name, content, message, sft, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    status, _, error = sft("--train_file", path, "--validation_file", path, "--on_bad_record=raise")
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in error
    assert not sft.output_dir.exists()


def test_line_number_survives_holding_out_and_drawing(sft, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *([GOOD] * 20), {"prompt": "a", "completion": None}, *([GOOD] * 9))
    status, _, error = sft(
        "--train_file", path, "--validation_fraction", "0.2", "--seed", "1", "--on_bad_record", "raise"
    )
    assert status == 1
    assert "x.jsonl, line 21: the completion must be text" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--dataset_name", "nobody/nothing"], "dataset 'nobody/nothing' cannot be loaded"),
        (["--dataset_name", "demo", "--dataset_text_field", "body"], "has no column 'body' (--dataset_text_field)"),
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
    status, output, error = sft("--dataset_name", "demo", "--optim", "adamw_torch", full=True)
    assert status == 0, error
    assert "AdamW" in output
    assert (sft.output_dir / "model.safetensors").is_file()
    results = json.loads((sft.output_dir / "results.json").read_text())
    assert "damping_mean" not in results


def test_layers_that_do_not_exist_are_named(sft):
    status, _, error = sft("--dataset_name", "demo", "--lora_target_modules", "wrong_proj")
    assert status == 1
    assert "lora_target_modules = wrong_proj" in error


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "keeps"), [("bfd", False), ("bfd_split", True), ("wrapped", True)])
def test_packing_that_splits_records_loses_no_token(strategy, keeps, sft, tmp_path):
    """As TRL, which cuts nothing then: https://github.com/huggingface/trl/pull/4632."""
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"text": "the owl eats mice and frogs " * 40}) + "\n") * 6)
    flags = [f"--packing_strategy={strategy}", "--packing", "--max_length=32", "--max_steps=1"]
    status, output, error = sft(*flags, f"--train_file={path}", "--eval_strategy=no", "--eval_on_start=false")
    assert status == 0, error
    assert ("were cut" in error) != keeps
    (rows,) = re.findall(r"packing: 6 records in (\d+) rows", output)
    assert (int(rows) > 12) == keeps
