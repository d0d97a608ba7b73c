"""DeepSpeed ZeRO takes the parameters over: what is kept of them, and how their places are found again."""

import gc
from unittest import mock

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import hf_tam
from tests.sharding import zero_engine

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed
STAGES = [1, 3]  # 2 differs from 1 by when gradients are summed


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def engine_of(module, optimizer, stage):
    config = zero_engine.configuration(stage)
    config |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    engine, *_ = zero_engine.import_deepspeed().initialize(model=module, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == stage
    assert not any(parameter is kept for kept in stepped(optimizer) for parameter in module.parameters())
    return engine


def stepped(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def batch(seed):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def train(engine, steps=4):
    for seed in range(steps):
        engine.backward(engine(batch(seed)).square().mean())
        engine.step()


def torques_of_a_twin(parameters, module, steps=4):
    """The same steps without DeepSpeed; every rank has the same batch."""
    optimizer = hf_tam.AdaTAMW(parameters, lr=0.05)
    for seed in range(steps):
        module.zero_grad()
        module(batch(seed)).square().mean().backward()
        optimizer.step()
    return optimizer.torque_stats()["torque"]


def run(case, *args):
    try:
        return globals()[case](*args)
    except RuntimeError as error:
        return str(error)


def memory_after_the_takeover(stage, name):
    module = model()
    cls = torch.optim.AdamW if name == "AdamW" else getattr(hf_tam, name)
    optimizer = cls(module.parameters(), lr=0.05)
    if name != "AdamW":
        optimizer.attach(module)
    memory = [StorageWeakRef(parameter.untyped_storage()) for parameter in module.parameters()]
    engine = engine_of(module, optimizer, stage)
    train(engine, 1)
    gc.collect()
    return sum(not reference.expired() for reference in memory)


@pytest.mark.parametrize(("stage", "name"), [(1, "AdaTAMW"), (2, "TAM"), (3, "AdamW"), (3, "AdaTAMW")])
def test_the_memory_of_the_unsharded_parameters_is_freed(worlds, stage, name):
    assert worlds(2).run(run, "memory_after_the_takeover", stage, name) == [0, 0]


def attached_late(stage):
    """As without hf_tam's hook on DeepSpeed: nobody has told the optimizer of the module when DeepSpeed takes over."""
    module, twin = model(), model()
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05)
    with mock.patch.object(optimizer, "attach"):
        engine = engine_of(module, optimizer, stage)
    refusals = [run("train", engine, 1)]
    optimizer.attach(module[2])
    refusals.append(run("train", engine, 1))
    optimizer.attach(module)
    train(engine)
    stats = optimizer.torque_stats()
    return refusals, (stats["torque"] - torques_of_a_twin(twin.parameters(), twin)).abs().max().item(), stats["names"]


@pytest.mark.parametrize("stage", STAGES)
def test_without_a_module_the_refusal_says_attach_and_that_helps(worlds, stage):
    for (unknown, partly_known), difference, names in worlds(2).run(run, "attached_late", stage):
        assert "it is no parameter, and none that this optimizer was built with" in unknown
        assert "With DeepSpeed ZeRO, or if you put it there yourself, call optimizer.attach(module)" in unknown
        assert "parameter 0 (shape (7, 5)) was given to the optimizer, and no attached module owns it" in partly_known
        assert difference <= 1e-6
        assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def put_in_by_hand(stage):
    """Groups that were changed before DeepSpeed takes them, with a frozen parameter among them."""
    module, twin = model(), model()

    def groups(part, optimizer=None):
        first, second = part[0], part[2]
        first.bias.requires_grad_(False)
        if optimizer is None:
            return [first.weight, first.bias, second.weight, second.bias]
        optimizer.param_groups[0]["params"] = [first.bias, second.bias, first.weight]
        optimizer.add_param_group({"params": [second.weight]})

    optimizer = hf_tam.AdaTAMW(groups(module), lr=0.05)
    groups(module, optimizer)
    optimizer.param_groups[0]["params"][1] = module[2].bias = nn.Parameter(module[2].bias.detach().clone())
    train(engine_of(module, optimizer, stage))
    groups(twin)
    order = [twin[0].bias, twin[2].bias, twin[0].weight, twin[2].weight]
    stats = optimizer.torque_stats()
    return (stats["torque"] - torques_of_a_twin(order, twin)).abs().max().item(), stats["names"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_order_is_that_of_the_groups_that_deepspeed_takes(worlds, stage):
    for difference, names in worlds(2).run(run, "put_in_by_hand", stage):
        assert difference <= 1e-6
        assert names == ["0.bias", "2.bias", "0.weight", "2.weight"]
