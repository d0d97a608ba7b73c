"""What the head is, and its own learning rate: a group that every optimizer gets, and a resumed run goes on with."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from recipes.support import classifier, heads
from recipes.support.config import CONFIGS, parse_recipe_arguments
from recipes.support.parsers import classify as classify_parser
from recipes.support.task_arguments import ClassifierRunArguments
from tests.recipes.test_target_loss import FULL, LORA, encoder, image_classifier

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS, IMAGES = AutoModelForSequenceClassification, AutoModelForImageClassification
QUIET = ["--report_to=none", "--disable_tqdm=true", "--use_cpu=true", "--logging_steps=1", "--warmup_steps=0"]


@pytest.mark.parametrize(
    ("auto_class", "model_type", "sizes", "names"),
    [
        (TEXTS, "bert", SMALL, ["classifier"]),
        (TEXTS, "roberta", SMALL, ["classifier"]),
        (TEXTS, "distilbert", {"dim": 16, "n_layers": 1, "n_heads": 2}, ["pre_classifier", "classifier"]),
        (TEXTS, "modernbert", SMALL, ["head", "classifier"]),
        (TEXTS, "llama", SMALL, ["score"]),
        (IMAGES, "vit", SMALL, ["classifier"]),
        (IMAGES, "resnet", {"hidden_sizes": [8] * 2, "depths": [1] * 2, "embedding_size": 8}, ["classifier"]),
        (IMAGES, "clip", {}, ["classifier"]),
    ],
)
def test_the_head_is_what_stands_beside_the_body(auto_class, model_type, sizes, names):
    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.for_model(model_type, **sizes))
    assert heads.head_names(model) == names


@pytest.mark.parametrize(("wanted", "rate"), [(None, None), ("10x", 2e-3), ("0.5x", 1e-4), ("3e-2", 3e-2)])
def test_a_rate_or_a_multiple(wanted, rate):
    assert ClassifierRunArguments(head_learning_rate=wanted).head_rate(2e-4) == (rate and pytest.approx(rate))


@pytest.mark.parametrize("wanted", ["x", "fast", "0", "-1x", "nan", "infx"])
def test_what_is_neither_is_one_line(wanted, capsys):
    with pytest.raises(SystemExit):
        parse_recipe_arguments(classify_parser(), [f"--head_learning_rate={wanted}"], demo_config=None)
    assert f"head_learning_rate = {wanted}: must be a rate above 0" in capsys.readouterr().err


@pytest.fixture
def trainers(monkeypatch):
    """The Trainers that are made."""
    made, run = [], classifier.run
    monkeypatch.setattr(
        classifier,
        "run",
        lambda recipe, trainer, *rest, **named: (made.append(trainer), run(recipe, trainer, *rest, **named))[1],
    )
    return made


def rates_of(trainer):
    """The first learning rate of each parameter's group, by what it belongs to."""
    model = trainer.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            kind = (
                "head" if "classifier" in names[id(parameter)] else "B" if "lora_B" in names[id(parameter)] else "body"
            )
            found.setdefault(kind, set()).add(group["initial_lr"])
    return {kind: sorted(rates) for kind, rates in found.items()}


OTHERS = ("adatam", "sgd", "tam")


@pytest.mark.long
@pytest.mark.parametrize(
    ("optim", "what", "named"),
    [
        pytest.param(optim, what, named, marks=[pytest.mark.slow] * (what is not FULL and optim in OTHERS))
        for what, named in ((FULL, "10x"), (LORA, "1e-2"), ([*LORA, "--loraplus_lr_ratio=4"], "10x"))
        for optim in ("adamw_torch", "adatamw", "adatam", "tam", "sgd")
    ],
)
def test_every_optimizer_gets_the_group(optim, what, named, trainers, tmp_path):
    recipe, flags = encoder("bert", tmp_path)
    flags += [*what, f"--optim={optim}", "--learning_rate=1e-3", f"--head_learning_rate={named}", "--weight_decay=0.1"]
    assert (
        recipe.main([*flags, *QUIET, "--max_steps=2", "--save_strategy=no", f"--output_dir={tmp_path / 'out'}"]) == 0
    )
    (trainer,) = trainers
    found = rates_of(trainer)
    assert found["head"] == pytest.approx([1e-2])
    assert found["body"] == pytest.approx([1e-3])
    assert found.get("B", [1e-3]) == pytest.approx([4e-3 if "--loraplus_lr_ratio=4" in what else 1e-3])
    # one schedule for both
    scales = [group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert scales == pytest.approx([scales[0]] * len(scales))
    # biases are not decayed, in the head neither
    decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decays == {0.0, 0.1}


@pytest.mark.long
@pytest.mark.parametrize("optim", ["adamw_torch", "adatamw"])
def test_a_resumed_run_goes_on_with_both_rates(optim, tmp_path):
    recipe, flags = image_classifier("vit", tmp_path)
    flags += [*FULL, *QUIET, f"--optim={optim}", "--head_learning_rate=10x", "--max_train_samples=32", "--max_steps=4"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert recipe.main([*flags, "--save_steps=2", f"--output_dir={whole}"]) == 0
    resume = f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    assert recipe.main([*flags, "--save_strategy=no", resume, f"--output_dir={resumed}"]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((whole / "results.json").read_text())["steps"] == 4


@pytest.mark.long
@pytest.mark.parametrize("named", [[], ["--head_learning_rate=1x"]], ids=str)
def test_one_rate_for_a_new_head_is_told_of(named, tmp_path, capsys):
    recipe, flags = encoder("bert", tmp_path)
    flags += [*FULL, *QUIET, *named, "--max_steps=1", "--save_strategy=no", f"--output_dir={tmp_path / 'out'}"]
    assert recipe.main(flags) == 0
    assert ("--head_learning_rate 20x may teach it more" in capsys.readouterr().out) == (not named)


@pytest.mark.parametrize("name", ["classify", "clinc150"])
def test_the_files_have_it(name):
    path = CONFIGS / "minilm" / f"{name}.yaml"
    run, *_, arguments = parse_recipe_arguments(classify_parser(), ["--config", str(path)], demo_config=None)
    assert run.head_rate(arguments.learning_rate) == pytest.approx(2e-2)
