"""Adapters on experts, which transformers keeps in one parameter of three dimensions."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from recipes import sft
from tests.recipes.architectures import ARCHITECTURES
from tests.recipes.conftest import EVALUATED, EXACT
from tests.recipes.tiny_models import CHAT, build

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.long
@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"])
def test_experts_are_adapted_saved_loaded_and_merged(name, tmp_path):
    """One angle for all experts of a tensor: each matrix of the adapter is one tensor with one torque."""
    if ARCHITECTURES[name].model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {name}")
    folder, out = build(name, tmp_path / "model"), tmp_path / "out"
    records = tmp_path / "chats.jsonl"
    records.write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    options = {
        "model_name_or_path": folder, "train_file": records, "validation_file": records, "output_dir": out,
        "learning_rate": 1e-2, "max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2, "lora_r": 4,
        "lora_dropout": 0.0, "use_cpu": "true", "disable_tqdm": "true", "num_sample_generations": 0,
    }  # fmt: skip
    words = [
        "--use_peft",
        "--merge",
        *EXACT,
        *EVALUATED,
        "--lora_target_modules",
        "q_proj",
        "--lora_target_parameters",
    ]
    assert sft.main([*words, *EXPERTS, *(f"--{key}={value}" for key, value in options.items())]) == 0
    weights = load_file(out / "adapter_model.safetensors")
    of_experts = {name: tensor for name, tensor in weights.items() if ".experts." in name}
    assert len(of_experts) == 2 * len(EXPERTS) * AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers
    assert all(tensor.any() for tensor in of_experts.values())
    results = json.loads((out / "results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]
    state = torch.load(out / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(weights)
    assert all(entry["torque"].shape == () and entry["torque"] != 0 for entry in state.values())
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out).eval()(input_ids=ids)
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()(input_ids=ids)
    torch.testing.assert_close(merged.logits, adapted.logits, rtol=1e-4, atol=1e-4)
