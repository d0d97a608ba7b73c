"""DeepSpeed settings that would train another optimizer, silently, are refused by name."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

import hf_tam
from hf_tam.integrations.deepspeed import refuse_swap_in_config
from tests.integrations.test_trainer import make_trainer
from tests.integrations.untouched import tiny_llama

BLOCK = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 2}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BLOCK, ['"optimizer" block', "AdamW", "remove it"]),
        (OFFLOAD, ['"zero_force_ds_cpu_optimizer": false', "DeepSpeedCPUAdam"]),
        (OFFLOAD | {"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer"]),
    ],
)
def test_a_swap_is_refused(config, words):
    with pytest.raises(ValueError, match="would replace") as caught:
        refuse_swap_in_config(config)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": None}},
        OFFLOAD | {"zero_force_ds_cpu_optimizer": False},
    ],
)
def test_what_keeps_the_optimizer_is_accepted(config):
    refuse_swap_in_config(config)


@pytest.mark.parametrize("config", [BLOCK, OFFLOAD])
def test_training_arguments_refuse_before_training(tmp_path, config, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": "auto"}))
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "bf16": False}
    with pytest.raises(ValueError, match="would replace"):
        TrainingArguments(optim="adatamw", deepspeed=str(path), **options)
    TrainingArguments(optim="adamw_torch", deepspeed=str(path), **options)


def test_the_settings_of_accelerate_launch_are_read_too(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(ValueError, match='set "zero_force_ds_cpu_optimizer": false'):
        TrainingArguments(output_dir=str(tmp_path), optim="adatamw", use_cpu=True, report_to="none", bf16=False)


def test_an_optimizer_that_is_not_selected_by_name_is_protected_too(tmp_path, monkeypatch):
    model = tiny_llama()
    optimizer = hf_tam.TAM(model.parameters())
    trainer = make_trainer(tmp_path, model=model, optim="sgd", optimizers=(optimizer, None))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=BLOCK))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    with pytest.raises(ValueError, match='"optimizer" block'):
        trainer.train()
