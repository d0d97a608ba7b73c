"""The configurations of seq2seq.py and vision.py: their headers are true of the real architectures, and they train."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from peft import TaskType
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    T5Config,
    ViTConfig,
)

from recipes import seq2seq, vision
from recipes.support import heads, models, seq2seq_demo
from recipes.support.arguments import ModelArguments
from recipes.support.config import CONFIGS, parse_recipe_arguments
from recipes.support.reporting import read_metrics
from tests.recipes.test_sft_data import write_lines

FLAN = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu"}
ARCHITECTURES = {
    "google-t5/t5-small": T5Config(),
    "google/flan-t5-base": T5Config(**FLAN),
    "google/vit-base-patch16-224-in21k": ViTConfig(num_labels=10),
}
FILES = sorted(path for name in ("t5-small", "flan-t5-base", "vit-base") for path in (CONFIGS / name).glob("*.yaml"))
FIELDS = ["Purpose", "Launch", "Override", "Hardware", "Learning rate", "Trainable", "Source"]
T5_LAYERS = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"}
# Random models of 1e5 parameters need a larger rate than trained ones of 1e8 to move in three steps.
TINY_LEARNING_RATE = "1e-2"

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def header(path):
    """The header's fields, each in one line."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    fields = {}
    for line in lines:
        title = re.match(rf"({'|'.join(FIELDS)}):\s+(.*)", line)
        if title:
            fields[title[1]] = title[2]
        else:
            fields[list(fields)[-1]] += f" {line}"
    return fields


def is_vision(path):
    return path.parent.name == "vit-base"


def arguments_of(path, *more):
    recipe = vision if is_vision(path) else seq2seq
    flags = ["--config", str(path), *map(str, more)]
    return parse_recipe_arguments(recipe.make_parser(), flags, demo_config=recipe.DEMO_CONFIG)


def adapted(path, config):
    """The architecture of `config` on the meta device, with this file's adapter."""
    lora = next(group for group in arguments_of(path) if isinstance(group, ModelArguments))
    auto_class = AutoModelForImageClassification if is_vision(path) else AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
        if is_vision(path):
            return heads.add_adapter(model, lora, None)
        return models.add_adapter(model, lora, TaskType.SEQ_2_SEQ_LM)


def test_files_are_found():
    assert [f"{path.parent.name}/{path.stem}" for path in FILES] == [
        "flan-t5-base/full", "flan-t5-base/lora", "t5-small/full", "t5-small/lora", "vit-base/full", "vit-base/lora",
    ]  # fmt: skip


@each_file
def test_header_is_true_of_the_real_architecture(path):
    fields = header(path)
    assert list(fields) == FIELDS
    assert {"lora": "LoRA ", "full": "full "}[path.stem] in fields["Purpose"]
    assert f"recipes/configs/{path.parent.name}/{path.stem}.yaml" in fields["Launch"]
    rate = yaml.safe_load(path.read_text())["learning_rate"]
    assert fields["Learning rate"].startswith(f"{rate}: ")
    model = adapted(path, ARCHITECTURES[yaml.safe_load(path.read_text())["model_name_or_path"]])
    trained, total = models.count_parameters(model)
    share = f"{100 * trained / total:.2f}".replace("100.00", "100")
    assert fields["Trainable"].startswith(f"{trained:,} of {total:,} parameters ({share}%)")
    gigabytes = float(re.match(r"([\d.]+) GB for weights, gradients and states", fields["Hardware"])[1])
    assert gigabytes == pytest.approx((4 * (total - trained) + 16 * trained) / 1e9, rel=0.05)
    if path.stem == "lora":
        layers = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
        assert layers
        assert layers <= T5_LAYERS or is_vision(path)
        assert not any("lora" in name and "classifier" in name for name, _ in model.named_parameters())


@pytest.mark.long
@each_file
def test_three_steps_lower_the_loss(path, tmp_path):
    """On a random model of the same architecture, with this file's arguments but for rate and accumulation."""
    torch.manual_seed(0)
    inputs = tiny_images(tmp_path) if is_vision(path) else tiny_texts(path, tmp_path)
    recipe, output_dir = (vision if is_vision(path) else seq2seq), tmp_path / "out"
    flags = ["--config", path, "--output_dir", output_dir, *inputs, "--learning_rate", TINY_LEARNING_RATE]
    flags += ["--warmup_steps", 0, "--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 16]
    flags += ["--max_steps", 3, "--logging_steps", 1, "--lr_scheduler_type", "constant", "--save_strategy", "no"]
    flags += ["--eval_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert recipe.main([str(flag) for flag in flags]) == 0
    losses = [row["loss"] for row in read_metrics(output_dir / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert json.loads((output_dir / "results.json").read_text())["optimizer"] == "AdaTAMW"


def tiny_texts(path, tmp_path):
    """Sixteen records and a small model of the file's kind; returns the flags that name them."""
    train, _, _ = seq2seq_demo.demo_records()
    rows = list(train.dataset)[:16]
    file = write_lines(tmp_path / "rows.jsonl", *rows)
    tokenizer = seq2seq_demo.build_tokenizer([text for row in rows for text in row.values()])
    kind = "gated-gelu" if path.parent.name == "flan-t5-base" else "relu"
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj=kind, **size, **tokens)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = ["--train_file", file, "--test_file", file, "--validation_fraction", 0, "--max_target_length", 12]
    return [*named, "--model_name_or_path", tmp_path / "model"]


def tiny_images(tmp_path):
    """Sixteen images in two folders and a small ViT without a head for them; returns the flags that name them."""
    draw = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            pixels = draw.integers(level - 50, level + 50, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    config = ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").size["height"] == 32
    folder = tmp_path / "images"
    named = ["--train_folder", folder, "--test_folder", folder, "--validation_fraction", 0]
    return [*named, "--model_name_or_path", tmp_path / "model"]
