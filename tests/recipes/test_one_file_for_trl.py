"""One file for `python recipes/sft.py --config X` and for `hf-tam run -- trl sft --config X`."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts import sft as trl_sft

from recipes import sft
from recipes.support import early_checks  # noqa: F401  warnings of transformers about TRL are off
from recipes.support.config import parse_recipe_arguments
from tests.recipes.test_configs import FILES, TINY_LEARNING_RATE, content, each_file, tiny  # noqa: F401
from tests.recipes.tiny_models import CHAT
from tests.tables import check_rows

pytestmark = [pytest.mark.xdist_group("configs"), pytest.mark.usefixtures("small_garbage")]

# What only sft.py knows; TRL's command leaves keys aside that it does not know.
OURS: set[str] = set()
NAMED = {f"{path.parent.name}/{path.stem}": (path,) for path in FILES}
# A kind of adapter, of quantisation and of model each; the others are slow.
IN_GATE = {"llama3.2-1b/lora", "llama3.2-1b/qlora", "gpt2/full"}


def parse_as_trl(*words):
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    return parser.parse_args_and_config(words, return_remaining_strings=True, fail_with_unknown_args=False)


def test_every_key_is_trls():
    check_rows(_every_key_is_trls, NAMED)


def _every_key_is_trls(path):
    """And says to TRL what it says to sft.py."""
    *groups, unknown = parse_as_trl("--config", str(path), "--use_cpu", "true")
    assert {word.removeprefix("--") for word in unknown if word.startswith("--")} <= OURS
    theirs = {name: value for group in groups for name, value in vars(group).items()}
    parsed = parse_recipe_arguments(sft.make_parser(), ["--config", str(path), "--use_cpu=true"], demo_config=None)
    mine = {name: value for group in parsed for name, value in vars(group).items()}
    for name in content(path):
        assert mine[name] == theirs[name], name
    # The defaults of what the file leaves open are TRL's too.
    of_the_script = {"output_dir", "dataloader_pin_memory", "dataset_test_split"}
    for name in ModelConfig.__dataclass_fields__.keys() | SFTConfig.__dataclass_fields__.keys():
        if not name.startswith("_") and name not in of_the_script:
            assert mine[name] == theirs[name] or str(mine[name]) == str(theirs[name]), name


@pytest.fixture
def chats(tmp_path):
    """A data set that both read, of chats that differ in length."""
    rows = [{"messages": CHAT[: 2 + 2 * (index % 2)] if len(CHAT) > 2 else CHAT} for index in range(8)]
    folder = tmp_path / "data"
    for split, part in (("train", rows), ("test", rows[:3])):
        (folder / split).mkdir(parents=True)
        (folder / split / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=[] if name in IN_GATE else pytest.mark.slow)
        for name, (path,) in NAMED.items()
    ],
)
def test_both_take_the_same_steps(path, chats, tiny, tmp_path, monkeypatch):  # noqa: F811
    """The same weights at the end, as far as the steps of an Adam say so: +-lr where a gradient is next to 0."""
    if path.stem == "qlora":
        pytest.importorskip("bitsandbytes")
    # Of a model that sees, TRL reads the processor of images too; the small ones have none.
    monkeypatch.setattr("trl.trainer.sft_trainer.AutoProcessor", AutoTokenizer)
    options = {
        "model_name_or_path": tiny(path), "dataset_name": chats, "learning_rate": TINY_LEARNING_RATE,
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.0,
        "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "logging_steps": 1,
        "use_cpu": "true", "bf16": "false", "dtype": "float32", "disable_tqdm": "true", "report_to": "none",
    }  # fmt: skip
    words = ["--config", str(path), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    assert sft.main([*words, "--output_dir", str(tmp_path / "ours")]) == 0
    script, training, model, mixture, _ = parse_as_trl(*words, "--output_dir", str(tmp_path / "theirs"))
    trl_sft.main(script, training, model, mixture)
    name = "model.safetensors" if path.stem == "full" else "adapter_model.safetensors"
    mine, theirs = (load_file(tmp_path / folder / name) for folder in ("ours", "theirs"))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        apart = (mine[key].float() - tensor.float()).abs()
        if path.stem == "qlora":  # TRL keeps the adapter of a quantised model in bfloat16, sft.py in float32
            assert apart.norm() < 0.2 * tensor.float().norm(), key
        else:
            assert apart.quantile(0.99) < 0.05 * TINY_LEARNING_RATE, key
            assert apart.norm() < 0.02 * tensor.float().norm(), key
