"""What the comparisons start from."""

import csv
import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from recipes.comparisons import bases
from recipes.data import clinc150
from recipes.support import causal_demo


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bases_and_questions(tmp_path, monkeypatch):
    """Both architectures are trained on the same sentences, and no animal is in two splits."""
    build = causal_demo.build_base
    monkeypatch.setattr(causal_demo, "build_base", lambda *args, **kwargs: build(*args, **kwargs, num_steps=2))
    fill = bases.build_t5
    monkeypatch.setattr(bases, "build_t5", lambda folder: fill(folder, num_steps=2))
    tasks = tmp_path / "seed_tasks.jsonl"
    task = {"instruction": "Add.", "instances": [{"input": "1 + 1", "output": "2"}, {"input": "", "output": "none"}]}
    tasks.write_text("".join(json.dumps(task | {"id": number}) + "\n" for number in range(60)))
    assert bases.main([str(tmp_path), "--seed_tasks", str(tasks)]) == 0
    for name, kind in (("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / name)).__name__ == kind
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")).__name__ == "T5ForConditionalGeneration"
    splits = {name: records_of(tmp_path / "animals" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 240, "validation": 120, "test": 120}
    names = {name: {animal_of(record) for record in split} for name, split in splits.items()}
    assert [len(found) for found in names.values()] == [20, 10, 10]
    assert len(set().union(*names.values())) == 40
    (first, second, *_) = records_of(tmp_path / "tasks" / "test.jsonl")
    assert first == {"prompt": "Add.\n1 + 1\nAnswer:", "completion": " 2"}
    assert second == {"prompt": "Add.\nAnswer:", "completion": " none"}


def animal_of(record):
    (name,) = [
        row["name"] for row in bases.animals.animals() if f" {row['name']} " in record["completion"].replace(".", " ")
    ]
    return name


def test_gaps_are_filled_by_what_was_there():
    records = bases.animals.make_clozes()
    assert all(record["source"].count("<gap>") == 1 for record in records)
    statements = " ".join(bases.animals.make_statements(num_rounds=40, seed=0))
    assert all(record["source"].replace("<gap>", record["target"]) in statements for record in records)


def test_a_bad_task_file_is_one_line(tmp_path, capsys):
    path = tmp_path / "seed_tasks.jsonl"
    path.write_text("{}\n")
    assert bases.main([str(tmp_path / "out"), "--seed_tasks", str(path)]) == 2
    assert "seed_tasks.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_domains", [False, True])
def test_clinc150(tmp_path, with_domains, capsys):
    source, domains = tmp_path / "data_full.json", tmp_path / "domains.json"
    source.write_text(
        json.dumps({"train": [["hi, you", "greet"], ["bye", "leave"]], "val": [["hey", "greet"]], "test": []})
    )
    domains.write_text(json.dumps({"talk": ["greet", "leave"]}))
    flags = ["--domains", str(domains)] if with_domains else []
    assert clinc150.main([str(source), str(tmp_path / "out"), *flags]) == 0
    assert "2 train, 1 validation, 0 test" in capsys.readouterr().out
    with (tmp_path / "out" / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["hi, you", "greet", *(["talk"] if with_domains else [])]
    assert rows[0] == ["text", "label", *(["domain"] if with_domains else [])]


def test_clinc150_in_part(tmp_path):
    rows = [[f"text {number}", f"intent {number % 3}"] for number in range(30)]
    source = tmp_path / "data_full.json"
    source.write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    counts = clinc150.convert(source, tmp_path / "out", train_per_intent=4, eval_per_intent=2)
    assert counts == {"train": 12, "validation": 6, "test": 6}
    with (tmp_path / "out" / "test.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == rows[:6]


def test_another_file_is_not_clinc150(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert clinc150.main([str(tmp_path / "other.json"), str(tmp_path / "out")]) == 2
    assert "has no split 'train'" in capsys.readouterr().err
