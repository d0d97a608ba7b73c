"""DeepSpeed settings that would train another optimizer, silently, are refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import hf_tam
from hf_tam.integrations.deepspeed import refuse_split_model_scope, refuse_swap_in_config
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


def zero(**settings):
    return {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 3, **settings}}


@pytest.mark.parametrize(
    ("config", "name", "remedy"),
    [
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), '"offload_optimizer.ratio"', "Set it to 1"),
        (zero(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload", "Remove it"),
        (zero(offload_optimizer={"device": "nvme"}), "nvme", '"device": "cpu"'),
        (zero(zenflow={"topk_ratio": 0.1}), '"zenflow"', "Remove it"),
        (zero(elastic_checkpoint=True), '"elastic_checkpoint"', "universal checkpoint"),
        (zero(round_robin_gradients=True), '"round_robin_gradients"', "Remove it"),
        (zero(mics_shard_size=2), '"mics_shard_size"', "Remove it"),
        (zero() | {"tensor_parallel": {"autotp_size": 2}}, "autotp_size", "tp_size"),
        ({"bf16": {"enabled": True}}, "bf16 without ZeRO", '"stage": 1'),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16 without ZeRO", '"stage": 1'),
    ],
)
def test_settings_that_hide_tensors_are_refused(config, name, remedy):
    with pytest.raises(ValueError, match="does not go with an optimizer of hf_tam") as caught:
        refuse_swap_in_config(config)
    assert name in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": None}},
        OFFLOAD | {"zero_force_ds_cpu_optimizer": False},
        zero(offload_optimizer={"device": "cpu", "ratio": 1.0}, mics_shard_size=-1, zenflow=None),
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}},
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 0}},
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


def test_scope_model_is_refused_before_training_where_it_would_be_split():
    optimizer = hf_tam.AdaTAMW([torch.nn.Parameter(torch.zeros(2))], scope="model")
    refuse_split_model_scope(SimpleNamespace(bit16_groups=[[1]]), optimizer)
    refuse_split_model_scope(None, optimizer)
    for parts in ({"bit16_groups": [[1], [2]]}, {"fp16_groups": [[1], [2], [3]]}):
        with pytest.raises(ValueError, match=r"hands them over in [23] parts.*use scope='tensor'"):
            refuse_split_model_scope(SimpleNamespace(**parts), optimizer)
    other = hf_tam.AdaTAMW([torch.nn.Parameter(torch.zeros(2))])
    refuse_split_model_scope(SimpleNamespace(bit16_groups=[[1], [2]]), other)
