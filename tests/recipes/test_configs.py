"""Every file of recipes/configs/ that is for sft.py: what its header says is true, and it trains.

Files are found, not listed. What a header claims about the real model is computed from the real architecture on the
meta device; what runs is a random model of the same class with every size cut down.
"""

import functools
import json
import math
import re
import shlex

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from hf_tam.cli.recipe_files import read_header, recipe_of
from recipes import sft
from recipes.support.arguments import ModelArguments
from recipes.support.config import CONFIGS, parse_recipe_arguments
from recipes.support.models import count_parameters
from tests.recipes.architectures import ARCHITECTURES, activations_in_gb, adapted_model, memory_in_gb
from tests.recipes.conftest import ROOT
from tests.recipes.tiny_models import CHAT, build, tiny_config
from tests.tables import check_rows

KINDS = ("lora", "qlora", "full")
FIELDS = ["Purpose", "Launch", "Override", "Hardware", "Learning rate", "Trainable", "Source"]
FILES = [
    path
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name != "demo" and recipe_of(path.read_text()) == "sft.py"
]
NAMED = {f"{path.parent.name}/{path.stem}": (path,) for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
# They share tiny models and the real architectures, which each worker would build again.
pytestmark = [pytest.mark.xdist_group("configs"), pytest.mark.usefixtures("small_garbage")]

COUNTED_IN_GATE = ("gpt2/lora", "smollm2-135m/lora", "qwen3-0.6b/full")
# Gigabytes that the device itself takes, and what lies between the tensors.
OF_THE_DEVICE = 1.5
# The rates of the files are for trained models of 1e8 to 1e10 parameters. Random ones of 1e5 need a hundred times that
# to move in a few steps, whatever optimizer they are given.
TINY_LEARNING_RATE = 1e-2


def content(path):
    return yaml.safe_load(path.read_text())


@functools.cache
def parser():
    return sft.make_parser()


def parse(*argv):
    return parse_recipe_arguments(parser(), list(argv), demo_config=sft.DEMO_CONFIG)


@functools.cache
def lora_arguments(path):
    return next(group for group in parse("--config", str(path)) if isinstance(group, ModelArguments))


def model_name(path):
    name = content(path)["model_name_or_path"]
    assert name in ARCHITECTURES, f"{path} is for {name}: add its numbers to tests/recipes/architectures.py"
    if ARCHITECTURES[name].model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {ARCHITECTURES[name].model_type}")
    return name


def number(pattern, text):
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in {text!r}"
    return match[1]


@functools.lru_cache(maxsize=2)
def _adapted(name, key):
    return adapted_model(name, ModelArguments(**json.loads(key)))


def real_model(path):
    """The real architecture with this file's adapter; a lora.yaml and the qlora.yaml after it share one."""
    lora = lora_arguments(path)
    names = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
    names += ("lora_target_parameters", "use_dora")
    return _adapted(model_name(path), json.dumps({name: getattr(lora, name) for name in names}))


def test_files_are_found():
    assert len(FILES) >= 50
    assert {path.stem for path in FILES} == set(KINDS)
    assert {content(path)["model_name_or_path"] for path in FILES} == set(ARCHITECTURES)


def test_header_has_the_fixed_form():
    check_rows(_has_the_fixed_form, NAMED)


def _has_the_fixed_form(path):
    header = read_header(path.read_text())
    assert list(header) in (FIELDS, [*FIELDS, "Not here"])
    assert all(header.values())
    assert {"qlora": "QLoRA ", "lora": "LoRA ", "full": "full "}[path.stem] in header["Purpose"]
    assert max(len(line) for line in path.read_text().splitlines()) <= 119


def test_launch_line_is_for_this_file():
    check_rows(_is_launched_by_its_line, NAMED)


def _is_launched_by_its_line(path):
    words = shlex.split(read_header(path.read_text())["Launch"])
    assert ROOT / words[words.index("--config") + 1] == path
    assert (ROOT / next(word for word in words if word.endswith(".py"))).is_file()
    assert words[0] in ("python", "accelerate")
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()


def test_override_example_is_understood():
    check_rows(_example_is_understood, NAMED)


def _example_is_understood(path):
    example = number(r"for example ([^;]+)", read_header(path.read_text())["Override"])
    flags = shlex.split(example)
    values = {name: value for group in parse("--config", str(path), *flags) for name, value in vars(group).items()}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        actual = values[flag.removeprefix("--")]
        assert actual == (float(value) if isinstance(actual, float) else yaml.safe_load(value))


def test_learning_rate_is_explained():
    check_rows(_learning_rate_is_explained, NAMED)


def _learning_rate_is_explained(path):
    text = read_header(path.read_text())["Learning rate"]
    assert float(number(r"^(\d\S*): ", text)) == float(content(path)["learning_rate"])
    assert len(text) > 60


def test_what_is_not_there_is_explained():
    check_rows(_missing_files_are_explained, {path.parent.name: (path.parent,) for path in FILES})


def _missing_files_are_explained(folder):
    missing = read_header((folder / "lora.yaml").read_text()).get("Not here", "")
    for kind in KINDS:
        assert (folder / f"{kind}.yaml").is_file() is not bool(re.search(rf"(^| ){kind}\.yaml: ", missing)), kind


def test_no_two_runs_write_to_the_same_folder():
    assert len({content(path)["output_dir"] for path in FILES}) == len(FILES)


@each_file
def test_header_is_true_of_the_real_architecture(path):
    """Its class, the layers that are adapted, the counts and the memory; one test, so that it is built once."""
    lora, header = lora_arguments(path), read_header(path.read_text())
    model = real_model(path)
    base = model.get_base_model() if lora.use_peft else model
    assert type(base).__name__ == ARCHITECTURES[model_name(path)].class_name
    if lora.use_peft:
        _check_adapted_layers({name for name, param in model.named_parameters() if param.requires_grad})
    trained, total = count_parameters(model)
    assert header["Trainable"] == f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f}%)"
    memory = memory_in_gb(model, lora)
    assert header["Hardware"].startswith(f"{memory:.2f} GB " if memory < 1 else f"{memory:.1f} GB ")
    num_gpus = int(number(r"on each of (\d) GPUs", header["Hardware"])) if "on each of" in header["Hardware"] else 1
    activations = float(number(r"(\d+) GB of activations", header["Hardware"]))
    room = float(number(r"GPUs? of (\d+) GB", header["Hardware"]))
    assert memory / num_gpus + activations + OF_THE_DEVICE <= room


@pytest.mark.long
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=[] if name in COUNTED_IN_GATE else pytest.mark.slow)
        for name, (path,) in NAMED.items()
    ],
)
def test_activations_are_those_that_are_kept(path):
    """Rounded up, with half a gigabyte for what a backward pass needs meanwhile."""
    _, of_model, _, training = parse("--config", str(path))
    counted = activations_in_gb(model_name(path), of_model, training)
    said = int(number(r"(\d+) GB of activations", read_header(path.read_text())["Hardware"]))
    assert said == math.ceil(counted + 0.5)


def _check_adapted_layers(adapted):
    assert adapted
    assert all(".lora_A." in name or ".lora_B." in name for name in adapted)
    assert not [name for name in adapted if re.search(r"vision|audio|lm_head|embed_|router|\.gate\.|experts", name)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Builds small models, once for all real ones that shrink to the same."""
    folders = {}

    def folder_of(path):
        name = model_name(path)
        key = tiny_config(name).to_json_string()
        if key not in folders:
            folders[key] = build(name, tmp_path_factory.mktemp("tiny") / "model")
        return folders[key]

    return folder_of


@pytest.fixture
def train(tiny, tmp_path):
    """Runs sft.py in this process on copies of one chat, and returns the results and the output directory."""
    records = tmp_path / "chats.jsonl"
    records.write_text((json.dumps({"messages": CHAT}) + "\n") * 8)

    def run(path, *flags):
        if path.stem == "qlora":
            pytest.importorskip("bitsandbytes")
        options = {
            "model_name_or_path": tiny(path), "train_file": records, "validation_file": records,
            "output_dir": tmp_path / "out", "learning_rate": TINY_LEARNING_RATE, "lr_scheduler_type": "constant",
            "warmup_steps": 0, "use_cpu": "true", "disable_tqdm": "true", "report_to": "none",
            "assistant_only_loss": "true",
        }  # fmt: skip
        given = [f"--{name}={value}" for name, value in options.items()]
        assert sft.main([f"--config={path}", *given, *flags]) == 0
        return json.loads((tmp_path / "out" / "results.json").read_text()), tmp_path / "out"

    return run


@pytest.mark.long
@each_file
def test_three_steps_lower_the_loss(path, train):
    """The loss after is that of the same records as before, without dropout, so it must fall on any machine."""
    results, output_dir = train(
        path, "--max_steps=3", "--gradient_accumulation_steps=1", "--per_device_train_batch_size=2",
        "--eval_strategy=no", "--save_strategy=no", "--num_sample_generations=0",
    )  # fmt: skip
    assert results["eval_loss_before"] == pytest.approx(math.log(64), abs=0.3)
    assert results["eval_loss"] < 0.985 * results["eval_loss_before"]
    assert results["optimizer"] == "AdaTAMW"
    assert (output_dir / ("model.safetensors" if path.stem == "full" else "adapter_model.safetensors")).is_file()


@pytest.mark.slow
@each_file
def test_a_whole_run_ends_with_what_it_reports(path, train, tiny):
    """All epochs, evaluations and checkpoints of the file, and the weights that were saved give the loss reported."""
    results, output_dir = train(path)
    arguments = content(path)
    batch = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    num_steps = math.ceil(8 / batch) * arguments["num_train_epochs"]
    assert results["steps"] == num_steps
    assert (output_dir / f"checkpoint-{num_steps}").is_dir()
    assert results["eval_loss"] < 0.985 * results["eval_loss_before"]
    base = output_dir if path.stem == "full" else tiny(path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if path.stem == "full" else PeftModel.from_pretrained(model, output_dir)
    tokens = AutoTokenizer.from_pretrained(output_dir).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    labels = tokens["input_ids"].masked_fill(tokens["assistant_masks"] == 0, -100)
    # As the run evaluated.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=arguments.get("bf16", False)):
        loss = model.eval()(input_ids=tokens["input_ids"], labels=labels).loss.item()
    # The run rounded frozen weights to bfloat16, or to 4 bits.
    assert loss == pytest.approx(results["eval_loss"], rel={"full": 1e-4, "lora": 2e-2, "qlora": 0.1}[path.stem])
