"""The loop to be copied: what it needs, what it learns of a record, equal steps, exact resuming, what it saves."""

import ast
import json
import re
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_tam.lab.report.reading import read_runs
from tests.recipes.conftest import ROOT
from tests.recipes.loop_runs import (
    NUM_RECORDS,
    OPTIONS,
    SCRIPT,
    assert_same_adapter,
    assert_same_rows,
    build_inputs,
    rows_of,
    run_here,
    write_records,
)
from tests.recipes.tiny_models import CHAT

MOST_LINES = 200
LIBRARIES = {"torch", "accelerate", "transformers", "peft", "datasets", "hf_tam"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return build_inputs(tmp_path_factory.mktemp("loop"))


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """Run the script in this process; returns where it wrote to."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def start(name="out", **options):
        given = {**inputs, **OPTIONS, "output_dir": tmp_path / name, **options}
        start.names = run_here({key: value for key, value in given.items() if value is not None})
        return tmp_path / name

    return start


def test_it_is_one_short_file_that_needs_nothing_of_the_recipes():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= LIBRARIES | sys.stdlib_module_names


def test_what_is_written_about_it_names_arguments_that_it_has():
    (arguments,) = [node for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.ClassDef)]
    names = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    readme = (ROOT / "recipes" / "README.md").read_text()
    section = readme.split("## A loop of your own")[1].split("\n## ")[0]
    told = re.findall(r"(?<=--)\w+", section + ast.get_docstring(ast.parse(SCRIPT.read_text())))
    assert "use_peft" in told
    assert set(told) - {"config_file"} <= names


CHAT_TOKENS = "<user> what does the owl eat <end> <assistant> the owl eats mice and frogs <end>"


@pytest.mark.long
@pytest.mark.parametrize(
    ("records", "options", "tokens", "num_learnt"),
    [
        ([{"text": "the owl eats mice"}], {}, "the owl eats mice <end>", 5),
        ([{"prompt": "the owl", "completion": "eats mice"}], {}, "the owl eats mice <end>", 3),
        ([{"prompt": "the owl eats", "completion": "mice"}], {"max_length": 4}, "the owl eats mice", 1),
        ([{"messages": CHAT[:2]}], {}, CHAT_TOKENS, 15),
        ([{"messages": CHAT[:2]}], {"assistant_only_loss": "true"}, CHAT_TOKENS, 7),
    ],
)
def test_what_is_learnt_of_a_record(records, options, tokens, num_learnt, run, tmp_path):
    file = write_records(tmp_path / "records.jsonl", records)
    run(train_file=file, validation_file=file, max_steps=1, save_steps=0, **options)
    (row,) = run.names["kept"]["train"]
    assert run.names["tokenizer"].decode(row["input_ids"]) == tokens
    learnt = [label for label in row["labels"] if label != -100]
    assert learnt == row["input_ids"][-num_learnt:]


@pytest.mark.long
def test_keys_that_other_records_brought_in_are_not_in_the_chat(run, tmp_path, monkeypatch):
    turns = [{**CHAT[0], "name": "Ann"}, CHAT[1]]
    file = write_records(tmp_path / "chats.jsonl", [{"messages": turns}] * 2)
    run(train_file=file, validation_file=file, max_steps=1, save_steps=0)
    given = []
    names = run.names["encode"].__globals__
    monkeypatch.setattr(
        names["tokenizer"],
        "apply_chat_template",
        lambda turns, **options: given.append((turns, options)) or {"input_ids": [1, 2]},
    )
    tool = {"type": "function", "function": {"name": "look_up"}}
    names["encode"]({"messages": [{"role": "user", "content": "x", "name": None}], "tools": [tool]})
    assert given[0][0] == [{"role": "user", "content": "x"}]
    assert given[0][1]["tools"] == [tool]


@pytest.mark.long
def test_records_without_a_target_are_counted_and_left_out(run, tmp_path, capsys):
    pairs = [{"prompt": "the owl eats", "completion": "mice"}, {"prompt": "the owl eats mice", "completion": "and"}]
    file = write_records(tmp_path / "pairs.jsonl", pairs)
    run(train_file=file, validation_file=file, max_steps=1, save_steps=0, max_length=4)
    assert "{'train': 2, 'test': 2}, with a target within 4 tokens: {'train': 1, 'test': 1}" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 4])
def test_a_step_is_the_same_however_its_records_are_split(size, run):
    """Two epochs, of which the last step has fewer records, and lengths that differ."""
    options = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 0}
    whole = run("whole", per_device_train_batch_size=8, **options)
    parts = run(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **options)
    assert len(rows_of(whole)) == 2 * -(-NUM_RECORDS // 8)
    assert_same_rows(parts, whole, tolerance=1e-5)
    assert_same_adapter(parts, whole, tolerance=1e-5)


@pytest.mark.long
def test_a_record_is_padded_on_the_right(run, inputs, tmp_path):
    """On the left its tokens would have other positions in other batches."""
    folder = tmp_path / "model"
    shutil.copytree(inputs["model_name_or_path"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    result = run(model_name_or_path=folder, max_steps=1)
    batch, _ = run.names["load_batch"](run.names["kept"]["train"], torch.arange(8))
    assert batch["attention_mask"][:, 0].all()
    assert not batch["attention_mask"].all()
    assert json.loads((result / "tokenizer_config.json").read_text())["padding_side"] == "left"


RESUMED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lora_dropout": 0.1, "max_steps": 8}


@pytest.mark.long
@pytest.mark.parametrize("options", [RESUMED, {"use_peft": "false", "weight_decay": 0.1}], ids=["adapter", "full"])
def test_resuming_gives_the_bits_of_the_run_that_was_not_stopped(options, run):
    """In the middle of an epoch, with dropout, accumulation and a schedule; the whole model has tied weights."""
    whole = run("whole", **options)
    parts = whole.with_name("parts")
    parts.mkdir()
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    # What was logged after the checkpoint is written anew.
    shutil.copy(whole / "metrics.jsonl", parts)
    torch.manual_seed(1)
    run("parts", **options, resume_from_checkpoint="auto")
    last = f"checkpoint-{rows_of(whole)[-1]['step']}"
    states = [torch.load(folder / last / "optimizer.bin", weights_only=True)["state"] for folder in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert state["torque"] != 0
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    weights, others = (load_file(folder / last / "model.safetensors") for folder in (whole, parts))
    assert weights.keys() == others.keys()
    assert weights
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert rows_of(parts) == rows_of(whole)


@pytest.mark.long
def test_checkpoints_hold_what_is_trained(run):
    folder = run(max_steps=1)
    assert all("lora_" in name for name in load_file(folder / "checkpoint-1" / "model.safetensors"))


@pytest.mark.long
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(run):
    whole = run("whole")
    parts = whole.with_name("parts")
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-5")
    with (parts / "checkpoint-4" / "optimizer.bin").open("r+b") as file:
        file.truncate(1000)
    run("parts", resume_from_checkpoint="auto")
    assert_same_adapter(parts, whole, tolerance=0)
    with pytest.raises(ValueError, match=r"optimizer\.bin is cut off"):
        run("other", resume_from_checkpoint=truncated(whole / "checkpoint-4"))


def truncated(folder):
    with (folder / "optimizer.bin").open("r+b") as file:
        file.truncate(1000)
    return folder


@pytest.mark.long
def test_a_finished_run_stays_as_it_is(run):
    folder = run()
    before = {path: path.read_bytes() for path in folder.glob("*.*") if path.suffix in (".jsonl", ".safetensors")}
    run(resume_from_checkpoint="auto")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.long
def test_resuming_with_other_arguments_is_refused_by_name(run):
    folder = run(max_steps=2)
    with pytest.raises(
        SystemExit, match=r"checkpoint-2 is of a run with \{'learning_rate': 0.003\}: resume with these"
    ):
        run(max_steps=2, learning_rate=1e-3, resume_from_checkpoint=folder / "checkpoint-2")


@pytest.mark.long
def test_auto_without_a_checkpoint_begins(run):
    assert rows_of(run(max_steps=1, resume_from_checkpoint="auto"))[0]["step"] == 1


@pytest.mark.long
def test_without_clipping_gradients_are_left_as_they_are(run):
    unclipped, wide, narrow = (run(f"{norm}", max_grad_norm=norm, max_steps=3) for norm in (0, 1e6, 1e-3))
    assert rows_of(unclipped) == rows_of(wide)
    assert rows_of(unclipped) != rows_of(narrow)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*were skipped because a gradient was NaN:RuntimeWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e30}, r"step \d: .*training has diverged. Give a lower --learning_rate"),
        ({"max_length": 1}, "Nothing to learn, or to evaluate on: .*'train': 0"),
        ({"num_train_epochs": 0, "max_steps": -1}, "Nothing to learn, or to evaluate on: 0 steps"),
    ],
)
def test_a_run_that_learns_nothing_ends_with_a_line(options, message, run):
    with pytest.raises(SystemExit, match=message):
        run(**options)


@pytest.mark.long
@pytest.mark.parametrize(
    ("auto_class", "options"),
    [(AutoPeftModelForCausalLM, {}), (AutoModelForCausalLM, {"use_peft": "false"})],
    ids=["adapter", "full"],
)
def test_what_is_saved_has_the_loss_that_was_reported(auto_class, options, run):
    """Of all targets of the records that were held out, each counted once."""
    folder = run(**options, per_device_train_batch_size=4)
    model = auto_class.from_pretrained(folder).eval()
    total, count = 0.0, 0
    for row in run.names["kept"]["test"]:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        num_targets = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * num_targets, count + num_targets
    assert total / count == pytest.approx(rows_of(folder)[-1]["eval_loss"], rel=1e-5)


@pytest.mark.long
def test_the_report_finds_what_it_draws(run):
    (report,) = read_runs([run()])
    assert {row["step"] for row in report.torque} == {row["step"] for row in report.metrics} == set(range(1, 6))


@pytest.mark.long
def test_a_tenth_is_held_out(run):
    run(validation_file=None, max_steps=1)
    assert run.names["kept"].num_rows == {"train": 16, "test": 2}


@pytest.mark.long
def test_records_are_encoded_once(run):
    """Whatever else is changed, for example to resume; the whole of the arguments would be another key each time."""
    run("first", max_steps=1)
    before = run.names["kept"]["train"].cache_files
    run("second", max_steps=1, learning_rate=1e-4, resume_from_checkpoint="auto")
    assert run.names["kept"]["train"].cache_files == before
    run("third", max_steps=1, max_length=6)
    assert run.names["kept"]["train"].cache_files != before


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_other_formats(suffix, run, tmp_path):
    table = Dataset.from_dict({"prompt": ["the owl", ""], "completion": ["eats mice", "the goat eats"]})
    getattr(table, f"to_{suffix}")(tmp_path / f"records.{suffix}")
    files = dict.fromkeys(("train_file", "validation_file"), tmp_path / f"records.{suffix}")
    run(**files, max_steps=1, save_steps=0)
    decoded = [run.names["tokenizer"].decode(row["input_ids"]) for row in run.names["kept"]["train"]]
    assert decoded == ["the owl eats mice <end>", "the goat eats <end>"]
