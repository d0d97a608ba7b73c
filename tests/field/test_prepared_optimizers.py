"""`Accelerator.prepare` and optimizers that would train nothing, or not what the user means: refused, or warned of."""

import logging
import os
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

import hf_tam
from tests.integrations.test_trainer import training_arguments
from tests.sharding.cpu_fsdp import fsdp_on_cpu

FLAT = r"fsdp_use_orig_params: false .* set fsdp_use_orig_params: true, or fsdp_version: 2"
WARNING = "belong to no model that was prepared"


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def small_model():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def step_once(accelerator, model, optimizer):
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()


class TestFlatParametersOfFsdp1:
    """Control: AdamW steps the old parameters, and the model stays as it is, without a word."""

    @pytest.fixture
    def flattening(self):
        """An Accelerator whose FSDP1 flattens, on one rank."""
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            with fsdp_on_cpu():
                yield lambda **more: Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(**more))
        finally:
            torch.distributed.destroy_process_group()

    def test_control_adamw_trains_nothing(self, flattening):
        accelerator = flattening()
        model = small_model()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        before = [param.detach().clone() for param in model.parameters()]
        step_once(accelerator, model, optimizer)
        assert all(param._is_flat_param for param in model.parameters())
        assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))

    @pytest.mark.parametrize(
        "prepare",
        [
            lambda accelerator, model, optimizer: accelerator.prepare(model, optimizer),
            lambda accelerator, model, optimizer: accelerator.prepare(optimizer),
            lambda accelerator, model, optimizer: (accelerator.prepare(model), accelerator.prepare(optimizer)),
            lambda accelerator, model, optimizer: accelerator.prepare_optimizer(optimizer),
        ],
        ids=["together", "the optimizer alone", "the model first", "by prepare_optimizer"],
    )
    def test_refused_at_prepare(self, flattening, prepare):
        model = small_model()
        with pytest.raises(ValueError, match=FLAT):
            prepare(flattening(), model, hf_tam.AdaTAMW(model.parameters()))

    def test_fsdp2_ignores_the_setting(self, flattening):
        accelerator = flattening(fsdp_version=2, use_orig_params=False, cpu_ram_efficient_loading=False)
        model = small_model()
        model, optimizer = accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters(), lr=0.1))
        before = [param.to_local().detach().clone() for param in model.parameters()]
        step_once(accelerator, model, optimizer)
        assert not any(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_USE_ORIG_PARAMS": "false"}
"""What `accelerate launch` makes of peft's examples/sft/configs/fsdp_config.yaml, and of others of that age."""


class TestFlatParametersByTheArguments:
    """Before a model is loaded."""

    def test_of_the_trainer(self, tmp_path):
        flat = {"fsdp": True, "fsdp_config": {"version": 1, "use_orig_params": False}}
        with pytest.raises(ValueError, match=FLAT):
            training_arguments(tmp_path, **flat)
        training_arguments(tmp_path, optim="adamw_torch", **flat)

    @pytest.mark.parametrize("changes", [{"FSDP_USE_ORIG_PARAMS": "true"}, {"FSDP_VERSION": "2"}], ids=str)
    def test_of_the_launcher(self, tmp_path, changes):
        with mock.patch.dict(os.environ, LAUNCHED), pytest.raises(ValueError, match=FLAT):
            training_arguments(tmp_path)
        with mock.patch.dict(os.environ, LAUNCHED | changes):
            training_arguments(tmp_path)

    def test_the_trainers_own_count_more_than_the_launchers(self, tmp_path):
        with mock.patch.dict(os.environ, LAUNCHED):
            training_arguments(tmp_path, fsdp=True, fsdp_config={"version": 2})
            training_arguments(tmp_path, fsdp=True, fsdp_config={"version": 1})  # true, unless it is said


@pytest.fixture
def warnings_of(caplog):
    """What was said so far."""
    caplog.set_level(logging.WARNING, logger="hf_tam")
    return lambda: [record.getMessage() for record in caplog.records]


class TestParametersOfNoModel:
    def test_a_new_embedding(self, accelerator, warnings_of):
        """`resize_token_embeddings` after the optimizer was built. Control: AdamW trains the old one, silently."""
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        optimizer = hf_tam.AdaTAMW(model.parameters())
        model[0] = nn.Embedding(7, 4)
        accelerator.prepare(model, optimizer)
        (message,) = warnings_of()
        assert message.startswith(f"1 of 3 parameters of AdaTAMW (the first has shape (5, 4)) {WARNING}, while 0.wei")

    @pytest.mark.parametrize("together", [True, False])
    def test_assigned_weights(self, accelerator, warnings_of, together):
        model = small_model()
        optimizer = hf_tam.AdaTAMW(model.parameters())
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        if together:
            accelerator.prepare(model, optimizer)
        else:
            accelerator.prepare(model)
            accelerator.prepare(optimizer)
        (message,) = warnings_of()
        assert message.startswith("4 of 4 parameters of AdaTAMW")

    def test_latents_beside_a_frozen_model(self, accelerator, warnings_of):
        accelerator.prepare(small_model().requires_grad_(False), hf_tam.AdaTAMW([torch.zeros(3, requires_grad=True)]))
        assert warnings_of() == []

    def test_an_optimizer_for_a_part_of_the_model(self, accelerator, warnings_of):
        model = small_model()
        accelerator.prepare(model, hf_tam.AdaTAMW(model[1].parameters()))
        assert warnings_of() == []

    def test_latents_beside_a_model_that_another_optimizer_trains(self, accelerator, warnings_of):
        model, latent = small_model(), torch.zeros(3, requires_grad=True)
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), hf_tam.AdaTAMW([latent]))
        assert warnings_of() == []


ORDERS = {
    "all at once": [(0, 1, 2, 3)],
    "each model with its own": [(0, 2), (1, 3)],
    "models first": [(0,), (1,), (2,), (3,)],
    "optimizers first": [(2,), (3,), (0,), (1,)],
    "the second optimizer last": [(2, 0, 1), (3,)],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_two_models_with_an_optimizer_each(accelerator, warnings_of, order):
    """As a GAN has them: each optimizer knows its own model, whatever was prepared before it, and nobody complains."""
    generator, discriminator = small_model(), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    optimizers = [hf_tam.AdaTAMW(generator.parameters(), lr=0.1), hf_tam.TAM(discriminator.parameters(), lr=0.1)]
    items = [generator, discriminator, *optimizers]
    for call in order:
        accelerator.prepare(*(items[position] for position in call))
    assert optimizers[0].torque_stats()["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizers[1].torque_stats()["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert warnings_of() == []


def test_prepared_by_the_single_methods(accelerator):
    model = accelerator.prepare_model(small_model())
    optimizer = hf_tam.AdaTAMW(model.parameters())
    accelerator.prepare_optimizer(optimizer)
    assert optimizer.torque_stats()["names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_fault_of_attach_is_not_swallowed(accelerator, monkeypatch):
    def refuse(self, module):
        raise ValueError("this model cannot be had")

    monkeypatch.setattr(hf_tam.AdaTAMW, "attach", refuse)
    model, other = small_model(), small_model()
    accelerator.prepare(other, hf_tam.TAM(other.parameters()))
    with pytest.raises(ValueError, match="this model cannot be had"):
        accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters()))
