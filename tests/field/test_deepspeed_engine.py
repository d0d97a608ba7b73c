"""`deepspeed.initialize` as users call it, without transformers and accelerate: checked, and attached, by itself."""

import os
import sys

import pytest
import torch
from torch import nn

import hf_tam
from tests.field.deepspeed_alone import deepspeed_alone
from tests.integrations.launching import run_successfully
from tests.sharding.zero_engine import configuration

pytest.importorskip("deepspeed")
OPTIMIZERS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


@pytest.fixture
def deepspeed():
    with deepspeed_alone() as module:
        yield module


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def names_of(module):
    return [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_the_module_is_attached_before_the_engine_takes_it(deepspeed, optimizer_class, stage):
    module = model()
    seen = []
    optimizer = optimizer_class(module.parameters(), lr=0.1)
    optimizer.attach = lambda attached: seen.append((attached, [tuple(p.shape) for p in attached.parameters()]))
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    deepspeed.initialize(model=module, optimizer=optimizer, config=configuration(stage))
    assert seen == [(module, shapes)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("as_function", [False, True], ids=["optimizer", "function that makes one"])
def test_names_are_known_without_attach(deepspeed, as_function, stage):
    module = model()
    given = (lambda parameters: hf_tam.AdaTAMW(parameters, lr=0.1)) if as_function else None
    optimizer = given or hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=configuration(stage))
    for _ in range(4):
        engine.backward(engine(torch.ones(3, 4)).square().mean())
        engine.step()
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    stats = optimizer.torque_stats()
    assert stats["names"] == names_of(module)
    assert stats["torque"].abs().min() > 0


@pytest.mark.parametrize("as_function", [False, True], ids=["optimizer", "function that makes one"])
def test_a_setting_that_cannot_be_right_is_refused(deepspeed, as_function):
    module = model()
    optimizer = (lambda parameters: hf_tam.TAM(parameters)) if as_function else hf_tam.TAM(module.parameters())
    config = configuration(2, round_robin_gradients=True)
    with pytest.raises(ValueError, match='"round_robin_gradients" in the DeepSpeed configuration'):
        deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config)


def test_scope_model_over_two_groups_is_refused_before_training(deepspeed):
    module = model()
    groups = [{"params": [module[0].weight, module[2].weight]}, {"params": [module[0].bias, module[2].bias]}]
    with pytest.raises(ValueError, match=r"hands them over in 2 parts"):
        deepspeed.initialize(model=module, optimizer=hf_tam.AdaTAMW(groups, scope="model"), config=configuration(2))


def test_the_parameters_of_another_model_are_refused(deepspeed):
    with pytest.raises(ValueError, match="Sequential owns none of this optimizer's parameters"):
        deepspeed.initialize(model=model(), optimizer=hf_tam.AdaTAMW(model().parameters()), config=configuration(0))


def test_an_optimizer_block_without_effect_is_said_once(deepspeed, caplog):
    """DeepSpeed trains with the optimizer that it is given, whatever the block says."""
    module = model()
    config = configuration(1) | {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert engine.optimizer.optimizer is optimizer
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_tam"]
    assert messages == [
        'The "optimizer" block of the DeepSpeed configuration (AdamW) has no effect: AdaTAMW was passed to DeepSpeed.'
    ]


LATE = """
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
before = deepspeed.DeepSpeedEngine.__init__
import hf_tam
module = torch.nn.Linear(2, 2)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
config = {"train_batch_size": 1, "zero_optimization": {"stage": 2, "round_robin_gradients": True}}
print(deepspeed.DeepSpeedEngine.__init__.__wrapped__ is before)
try:
    deepspeed.initialize(model=module, optimizer=hf_tam.TAM(module.parameters()), config=config)
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


@pytest.mark.launch
def test_deepspeed_imported_first(tmp_path):
    output = run_successfully(
        [sys.executable, "-c", LATE], DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1",
        PYTHONPATH=os.environ.get("PYTHONPATH", ""), PYTHONPYCACHEPREFIX=os.environ.get("PYTHONPYCACHEPREFIX", ""),
    )  # fmt: skip
    assert "\nTrue\n" in f"\n{output}"
    assert '"round_robin_gradients" in the DeepSpeed configuration does not go with an optimizer' in output
