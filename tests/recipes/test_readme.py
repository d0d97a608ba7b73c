"""recipes/README.md: its commands are understood, its table is that of the files, its arithmetic is done again."""

import dataclasses
import re
import shlex

import pytest

from recipes import classify, sft
from recipes.support.arguments import ModelArguments
from recipes.support.config import parse_recipe_arguments
from recipes.support.configs_table import table
from tests.recipes import architectures
from tests.recipes.conftest import ROOT

README = (ROOT / "recipes" / "README.md").read_text()
RECIPES = {"recipes/sft.py": sft, "recipes/classify.py": classify}
# But for those that leave something out, or name a file that was copied; test_no_trainer.py has its own.
COMMANDS = [
    line.strip()
    for line in README.splitlines()
    if re.match(r"    (python recipes/|accelerate launch)", line)
    and not re.search(r"\.\.\.$|mine\.yaml|no_trainer\.py", line)
]
LLAMA_70B = architectures.Architecture(
    "llama",
    architectures.decoder(8192, 28672, 80, 64, 8, 128256, tie_word_embeddings=False),
    "torchtune's builder llama3_1_70b",
    "LlamaForCausalLM",
)


def test_table_is_that_of_the_files():
    assert table() in README, f"write into recipes/README.md what this prints:\n{table()}"


def test_every_folder_of_sft_configurations_is_in_the_table():
    folders = {path.parent.name for path in (ROOT / "recipes" / "configs").glob("*/lora.yaml")}
    in_table = set(re.findall(r"^\| `([^`]+)` ", table(), re.MULTILINE))
    for_sft = {name for name in folders if "sft.py" in (ROOT / f"recipes/configs/{name}/lora.yaml").read_text()}
    assert for_sft <= in_table
    assert len(in_table) >= 22


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    for file in (word for word in words if word.startswith("recipes/")):
        assert (ROOT / file).is_file(), file
    monkeypatch.chdir(ROOT)
    recipe = RECIPES[words[script]]
    parse_recipe_arguments(recipe.make_parser(), words[script + 1 :], demo_config=recipe.DEMO_CONFIG)


@pytest.fixture(scope="module")
def memory():
    """Gigabytes of Llamas of 1B, 8B and 70B, by the real architectures."""
    names = {"1B": "meta-llama/Llama-3.2-1B", "8B": "meta-llama/Llama-3.1-8B", "70B": "meta-llama/Llama-3.1-70B"}
    lora = ModelArguments(use_peft=True, lora_target_modules=["all-linear"])
    qlora = dataclasses.replace(lora, load_in_4bit=True, use_bnb_nested_quant=True)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, names["70B"], LLAMA_70B)
        for size, name in names.items():
            model = architectures.adapted_model(name, lora)
            found[f"{size}, LoRA"] = architectures.memory_in_gb(model, lora)
            found[f"{size}, QLoRA"] = architectures.memory_in_gb(model, qlora)
            total = sum(param.numel() for param in model.parameters() if not param.requires_grad)
            found[f"{size}, full"] = 16 * total / 1e9
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("row", "shares"),
    [
        ("1B, QLoRA", [1, 1, 1]),
        ("1B, LoRA", [1, 1, 1]),
        ("1B, full", [1, 1, 1]),
        ("8B, QLoRA", [1, 1, 1]),
        ("8B, LoRA", [1, 1, 1]),
        ("8B, full", [1, 8, 8]),
        ("70B, QLoRA", [1, 8, 8]),
        ("70B, LoRA", [1, 8, 8]),
        ("70B, full", [None, 8, 64]),
    ],
)
def test_memory_of_one_gpu(row, shares, memory):
    """The first number of gigabytes in each cell is that of a GPU; 80 and over do not fit."""
    cells = re.search(rf"^\| {row} \| (.*) \|$", README, re.MULTILINE)[1].split(" | ")
    for cell, share in zip(cells, shares, strict=True):
        if share is None:
            assert memory[row] > 80
            assert "does not fit" in cell
            continue
        gigabytes = int(re.search(r"(\d+) GB", cell)[1])
        assert gigabytes == round(memory[row] / share)
        assert (gigabytes > 80) is ("does not fit" in cell)
