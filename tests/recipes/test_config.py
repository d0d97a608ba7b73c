"""One parser for YAML and flags: what overrides what, and how a mistake is answered."""

import pytest
import yaml

from hf_tam.cli import recipe_files
from recipes import classify, domains, dpo, seq2seq, sft, shift, vision
from recipes.support.arguments import DatasetArguments, ModelArguments
from recipes.support.config import CONFIGS, FORMER_NAMES, flags_from_yaml, parse_recipe_arguments
from tests.tables import check_rows

# Those of TRL's own commands are read by TRL's parsers.
CONFIG_FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "trl")
NAMED = {f"{path.parent.name}/{path.stem}": path for path in CONFIG_FILES}
RECIPES = {
    "sft.py": sft,
    "classify.py": classify,
    "dpo.py": dpo,
    "seq2seq.py": seq2seq,
    "vision.py": vision,
    "shift.py": shift,
    "domains.py": domains,
}


def parse(*argv, recipe=sft):
    return parse_recipe_arguments(recipe.make_parser(), list(argv), demo_config=recipe.DEMO_CONFIG)


def header(path):
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


def recipe_of(path):
    return RECIPES[recipe_files.recipe_of(path.read_text())]


def test_shipped_configuration_is_understood_key_by_key(tmp_path):
    check_rows(_is_understood, {name: (path, tmp_path) for name, path in NAMED.items()})


def _is_understood(path, tmp_path):
    groups = parse("--config", str(path), f"--output_dir={tmp_path}", recipe=recipe_of(path))
    values = {name: value for group in groups for name, value in vars(group).items()}
    for key, value in yaml.safe_load(path.read_text()).items():
        name = key if key in values else FORMER_NAMES.get(key, key)
        if name == "output_dir":
            assert values[name] == str(tmp_path)
        elif isinstance(value, str) and isinstance(values[name], float):
            assert values[name] == float(value)
        else:
            assert values[name] in (value, [value], []) or [values[name]] == value


def test_shipped_configuration_says_what_it_is_for():
    check_rows(_says_what_it_is_for, {name: (path,) for name, path in NAMED.items()})


def _says_what_it_is_for(path):
    text = "\n".join(header(path))
    for title in ("Purpose:", "Launch:", "Override:", "Hardware:"):
        assert f"# {title}" in text


def test_there_are_configurations_for_every_recipe():
    assert {recipe_of(path) for path in CONFIG_FILES} == set(RECIPES.values())


def test_flag_overrides_file_and_file_overrides_default(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 1e-2\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\nuse_peft: true\n")
    _, lora, _, training = parse("--config", str(config), "--lora_r", "2")
    assert (training.learning_rate, lora.lora_r, lora.lora_alpha) == (1e-2, 2, 32)
    assert lora.lora_target_modules == ["q_proj", "v_proj"]


def test_nothing_named_is_the_demo_and_anything_named_is_not():
    assert parse("--seed", "3")[1].model_name_or_path == "demo"
    assert parse("--train_file", "mine.jsonl")[1].model_name_or_path is None
    assert parse("--train-file=mine.jsonl")[1].model_name_or_path is None
    assert parse("--model_name_or_path", "mine")[2].dataset_name is None
    assert parse("--dataset_name", "mine")[1].model_name_or_path is None


def test_default_optimizer_is_ours():
    for recipe in (sft, classify):
        assert parse(recipe=recipe)[-1].optim == "adatamw"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("lora_rank: 8\n", "unknown key 'lora_rank'; did you mean lora_r?"),
        ("zzz: 1\n", "unknown key 'zzz'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("lora_r: four\n", "invalid int value: 'four'"),
        ("learning_rate: [1, 2]\n", "unexpected value '2'"),
        ("- lora_r\n", "must hold a mapping"),
        ("lora_r: [\n", "is not YAML"),
        ("lora_r: 0\n", "lora_r = 0: must be at least 1"),
        ("eval_strategy: sometimes\n", "sometimes"),
    ],
)
def test_mistake_in_a_file_is_one_clear_line(content, message, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        parse("--config", str(config))
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "unknown argument --lerning_rate; did you mean --learning_rate?"),
        (["--learning", "1"], "unknown argument --learning"),
        (["--optim", "adamv"], "adamv"),
        (["--config", "missing.yaml"], "cannot read the configuration missing.yaml"),
        (["--dataset_name", "a", "--train_file", "b"], "exclude each other"),
        (["--validation_fraction", "1"], "must be in [0, 1)"),
    ],
)
def test_mistake_in_a_flag_is_one_clear_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_the_registered_optimizers(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert all(name in text for name in ("adatamw", "adatam", "--lora_r", "--train_file"))


def test_values_of_yaml_become_flags(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("a: -1\nb: [x, y]\nc: {k: 1}\nd: false\ne: null\n")
    assert flags_from_yaml(config, known=list("abcde")) == ["--a=-1", "--b", "x", "y", '--c={"k": 1}', "--d=false"]


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_key_that_older_versions_of_transformers_call_otherwise(name, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("activation_checkpointing: true\n")
    assert flags_from_yaml(config, known=[name]) == [f"--{name}=true"]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_range(dropout):
    with pytest.raises(ValueError, match="lora_dropout"):
        ModelArguments(lora_dropout=dropout)


def test_one_source_of_data():
    with pytest.raises(ValueError, match="exclude each other"):
        DatasetArguments(dataset_name="a", train_file="b")


@pytest.mark.parametrize(
    ("flags", "saves", "evaluates"),
    [
        (["--save_steps", "4"], "steps", "epoch"),
        (["--eval-steps=4"], "epoch", "steps"),
        (["--save_steps", "4", "--save_strategy", "epoch"], "epoch", "epoch"),
        ([], "epoch", "epoch"),
    ],
)
def test_steps_ask_for_their_strategy(flags, saves, evaluates):
    """The demo's file says epoch; a flag with a number of steps must not be without effect."""
    arguments = parse(*flags)[-1]
    assert (arguments.save_strategy, arguments.eval_strategy) == (saves, evaluates)
