"""A hand-written accelerate loop: the optimizer learns which module owns its parameters."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hf_tam


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


@pytest.mark.parametrize("order", ["import accelerate, hf_tam", "import hf_tam, accelerate"])
def test_in_any_order(order):
    script = f"{order}\nprint(hasattr(accelerate.Accelerator.prepare, '__wrapped__'))"
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert completed.stdout.strip() == "True"
