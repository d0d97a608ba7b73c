"""A hand-written accelerate loop: the optimizer learns which module owns its parameters."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

import hf_tam
from hf_tam.integrations.accelerate.patches import _attaching


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_prepare_attaches(accelerator, name):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = getattr(hf_tam, name)(model.parameters(), lr=0.1)
    model, prepared = accelerator.prepare(model, optimizer)
    for _ in range(3):
        accelerator.backward(model(torch.randn(5, 4)).square().sum())
        prepared.step()
        prepared.zero_grad()
    stats = optimizer.torque_stats()
    assert stats["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert stats["damping"].std() > 0


def test_model_and_optimizer_prepared_one_after_the_other(accelerator):
    model = accelerator.prepare(nn.Linear(4, 3))
    optimizer = hf_tam.AdaTAMW(model.parameters())
    assert optimizer.torque_stats()["names"] == [None, None]
    accelerator.prepare(optimizer)
    assert optimizer.torque_stats()["names"] == ["weight", "bias"]


def test_other_optimizers_and_models_are_left_alone(accelerator):
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    ours = hf_tam.TAM(other.parameters())
    accelerator.prepare(ours)  # its model was never prepared
    assert ours.torque_stats()["names"] == [None, None]


@pytest.mark.launch
@pytest.mark.parametrize("order", ["import accelerate, hf_tam", "import hf_tam, accelerate"])
def test_in_any_order(order):
    script = f"{order}\nprint(hasattr(accelerate.Accelerator.prepare, '__wrapped__'))"
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=400)
    assert completed.stdout.strip() == "True"


@pytest.mark.parametrize(("kind", "words"), [("MEGATRON_LM", "Megatron-LM"), ("XLA", "SPMD")])
def test_strategies_that_hide_tensors_are_refused(accelerator, monkeypatch, kind, words):
    model = nn.Linear(4, 3)
    optimizer = hf_tam.AdaTAMW(model.parameters())
    monkeypatch.setattr(type(accelerator), "distributed_type", getattr(DistributedType, kind))
    with pytest.raises(ValueError, match=f"{kind}: .*{words}.*Use DDP, FSDP"):
        accelerator.prepare(model, optimizer)


def test_a_deepspeed_swap_is_refused_before_it_happens(accelerator, monkeypatch):
    """accelerate puts DeepSpeedCPUAdam in the optimizer's place inside prepare(), where it is forced by name."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config["zero_force_ds_cpu_optimizer"] = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config), enable_msamp=False)
    monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", plugin)
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match='"zero_force_ds_cpu_optimizer": false'):
        accelerator.prepare(model, hf_tam.TAM(model.parameters()))
    accelerator.prepare(nn.Linear(4, 3))  # nothing of ours: accelerate's own business


def test_what_fsdp2_prepares_is_attached(accelerator, monkeypatch):
    """prepare() returns a list there, not a tuple."""
    model = nn.Linear(4, 3)
    optimizer = hf_tam.AdaTAMW(model.parameters())
    monkeypatch.setattr(accelerator, "_models", [model])
    prepare = _attaching(lambda self, *objects: list(objects))
    prepare(accelerator, model, optimizer)
    assert optimizer.torque_stats()["names"] == ["weight", "bias"]
