"""A configuration as the first word or by its name, other programs' names for arguments, and the groups of --help."""

import re

import pytest
from transformers import TrainingArguments

from recipes import classify, domains, dpo, seq2seq, sft, shift, vision
from recipes.support import other_names
from recipes.support.config import CONFIGS, parse_recipe_arguments

RECIPES = (classify, domains, dpo, seq2seq, sft, shift, vision)


def parse(*argv, recipe=sft):
    return parse_recipe_arguments(recipe.make_parser(), list(argv), demo_config=recipe.DEMO_CONFIG)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "words",
    [
        ["llama3.2-1b/lora"],
        ["--config", "llama3.2-1b/lora"],
        ["--config=llama3.2-1b/lora.yaml"],
        [str(CONFIGS / "llama3.2-1b" / "lora.yaml")],
    ],
)
def test_a_configuration_is_the_first_word_or_has_a_name(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *groups, training = parse(*words, "--learning_rate", "1e-5")
    assert training.output_dir == "outputs/llama3.2-1b-lora"
    assert training.learning_rate == 1e-5
    assert "meta-llama/Llama-3.2-1B" in [getattr(group, "model_name_or_path", None) for group in groups]


def test_a_file_comes_before_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "lora").write_text("seed: 3\n")
    assert parse("gpt2/lora")[-1].seed == 3


def test_what_is_neither_a_file_nor_a_name_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean llama3.2-1b/lora?" in refused(capsys, "llama3.2-1b/lor")
    assert "cannot read the configuration mine.yaml" in refused(capsys, "mine.yaml", "--seed", "1")
    assert "cannot read the configuration ddp" in refused(capsys, "ddp")  # a launch file is none
    assert "unexpected value 'mine.yaml'" in refused(capsys, "--seed", "1", "mine.yaml")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("lora_rank", "lora_r"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("sequence_len", "max_length"),
        ("cutoff_len", "max_length"),
        ("val_set_size", "validation_fraction"),
        ("base_model", "model_name_or_path"),
    ],
)
def test_names_of_other_programs_are_known_in_files_and_as_flags(name, ours, capsys, tmp_path):
    assert f"unknown argument --{name}; did you mean --{ours}?" in refused(capsys, f"--{name}", "1")
    assert f"did you mean --{ours}?" in refused(capsys, f"--{name.replace('_', '-')}=1")
    (tmp_path / "mine.yaml").write_text(f"{name}: 1\n")
    assert f"unknown key '{name}'; did you mean {ours}?" in refused(capsys, str(tmp_path / "mine.yaml"))


def test_what_only_the_script_says(capsys):
    assert "unknown argument --stage; the script says it" in refused(capsys, "--stage", "dpo")


def test_every_name_that_is_suggested_is_one_of_some_recipe():
    trl = pytest.importorskip("trl")
    known = {name for recipe in RECIPES for name in recipe.make_parser().field_names}
    kinds = (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.ModelConfig)
    of_trl = {name for kind in kinds for name in kind.__dataclass_fields__}
    suggested = {name for names in other_names._OURS.values() for name in names}
    assert suggested <= known | of_trl | set(TrainingArguments.__dataclass_fields__)
    assert all(other_names.nearest(name, sorted(known | of_trl)) for name in other_names._OURS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_help_is_grouped_and_ours_comes_first(recipe, capsys):
    with pytest.raises(SystemExit):
        parse("--help", recipe=recipe)
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if re.fullmatch(r"[a-z]+:", line)]
    assert [title for title in titles if title != "adapter:"] == ["options:", "model:", "data:", "run:", "trainer:"]
    group_of, title = {}, "options:"
    for line in lines:
        title = line if line in titles else title
        if line.startswith("  --"):
            group_of[line.split()[0].rstrip(",").removeprefix("--")] = title
    expected = {
        "model_revision": "model:", "dataset_name": "data:", "lora_r": "adapter:", "load_in_4bit": "adapter:",
        "config": "run:", "overwrite": "run:", "learning_rate": "trainer:", "use_cpu": "trainer:",
    }  # fmt: skip
    found = {name: title for name, title in group_of.items() if name in expected}
    assert found == {name: expected[name] for name in found}
    assert {"model_revision", "dataset_name", "config", "learning_rate"} <= set(found)
