"""recipes/configs/trl: what the headers say is true, and TRL's own parsers understand every key.

That they train is a matter of tests/integrations/test_trl_commands.py.
"""

import importlib
import re
import shlex

import pytest
import yaml

from hf_tam.cli.recipe_files import gigabytes_of, read_header, recipe_of
from recipes.support.config import CONFIGS
from tests.recipes.conftest import ROOT

pytest.importorskip("trl")
from recipes.support import trl_commands

FILES = sorted((CONFIGS / "trl").glob("*.yaml"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
FIELDS = ["Purpose", "Launch", "Override", "Hardware", "Learning rate"]
# Of Qwen/Qwen3-0.6B, as the header of its own lora.yaml has them for rank 32.
FROZEN, TRAINED_AT_RANK_32 = 596_049_920, 20_185_088


def parse(command, *arguments):
    parser = importlib.import_module(f"trl.scripts.{command}").make_parser()
    *groups, remaining = parser.parse_args_and_config(list(arguments), return_remaining_strings=True)
    assert remaining == []
    return {name: value for group in groups for name, value in vars(group).items()}


def is_same(value, written):
    """Whether an argument has what stands in a file or on a command line, where 1e-5 is text."""
    value = getattr(value, "value", value) or "none"  # of an enumeration; no tracker is an empty list
    if isinstance(value, str):
        return value.lower() == str(written).lower()
    return value == (float(written) if isinstance(value, float) else type(value)(written))


def mistake(command, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return trl_commands.find_mistake(command, str(path))


def test_there_is_one_for_each_command_without_a_script_of_ours():
    assert [path.stem for path in FILES] == ["grpo", "kto", "reward", "rloo"]


@each_file
def test_header_is_true(path):
    text = path.read_text()
    header, content = read_header(text), yaml.safe_load(text)
    assert list(header)[: len(FIELDS)] == FIELDS
    assert max(map(len, text.splitlines())) <= 119
    assert recipe_of(text) == f"trl {path.stem}"
    launch = shlex.split(header["Launch"])
    assert launch == ["hf-tam", "run", "--", "trl", path.stem, "--config", path.relative_to(ROOT).as_posix()]
    assert float(re.match(r"\S+(?=: )", header["Learning rate"])[0]) == float(content["learning_rate"])
    assert (content["model_name_or_path"], content["lora_r"]) == ("Qwen/Qwen3-0.6B", 16)
    assert float(gigabytes_of(header["Hardware"])) == round((2 * FROZEN + 16 * TRAINED_AT_RANK_32 / 2) / 1e9, 1)


@each_file
def test_every_key_arrives_and_the_example_overrides_it(path):
    header, content = read_header(path.read_text()), yaml.safe_load(path.read_text())
    values = parse(path.stem, "--config", str(path), "--use_cpu", "true")
    for key, value in content.items():
        assert is_same(values[key], "all-linear" if value == ["all-linear"] else value), key
    assert values["optim"] == "adatamw"
    example = shlex.split(re.search(r"for example (.+)", header["Override"])[1])
    overridden = parse(path.stem, "--config", str(path), "--use_cpu", "true", *example)
    for flag, value in zip(example[::2], example[1::2], strict=True):
        name = flag.removeprefix("--")
        assert is_same(overridden[name], value)
        assert overridden[name] != values[name]


@each_file
def test_validation_accepts_it(path):
    assert trl_commands.find_mistake(path.stem, str(path)) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("cutoff_len: 128\n", "unknown key 'cutoff_len'; did you mean max_completion_length?"),
        ("lora_r: four\n", "invalid int value: 'four'"),
        ("num_generations: 3\n", "must be divisible by num_generations (3)"),
        ("optim_args: gama=0.8\noptim: adatamw\n", "optim_args has 'gama'"),
        ("- lora_r\n", "must hold a mapping"),
    ],
)
def test_a_mistake_is_one_line(text, message, tmp_path):
    found = mistake("grpo", text, tmp_path)
    assert message in found
    assert "\n" not in found


def test_what_accelerate_is_handed_is_no_mistake(tmp_path):
    text = "num_processes: 2\naccelerate_config: fsdp2\nenv: {NAME: 1}\noptim: adatamw\n"
    assert mistake("grpo", text, tmp_path) == ""


def test_a_command_that_is_none(tmp_path):
    assert "'trl grpoo' is no command" in mistake("grpoo", "optim: adatamw\n", tmp_path)
