"""The names of parameters under every nesting of wrappers are those of the user's own model."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import hf_tam


class Block(nn.Module):
    """Has parts that are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, inputs):
        return self.module(inputs) * self.gain


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Block()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, inputs):
        for block in (self.module, *self.blocks):
            inputs = block(inputs)
        return inputs + self.shift


NAMES = [name for name, _ in Model().named_parameters()]


@pytest.fixture(autouse=True)
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, Block))
    return model


def block_compiled(model):
    """As a regional compilation does."""
    inner = next(part for part in model.modules() if isinstance(part, Model))
    inner.blocks[0] = torch.compile(inner.blocks[0], backend="eager")
    return model


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def block_in_fsdp1(model):
    model.blocks[1] = fsdp1(model.blocks[1])
    return model


def fsdp2(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpointed,
    "compiled block": block_compiled,
    "fsdp1": fsdp1,
}
NESTINGS = [
    *itertools.product(WRAPPERS, repeat=1),
    *(pair for pair in itertools.product(WRAPPERS, repeat=2) if len(set(pair)) == 2),
    ("compile", "ddp", "compile"),
    ("block in fsdp1", "ddp", "compile"),
    ("fsdp2", "compile"),
    ("checkpoint", "fsdp2"),
]
EVERY = {**WRAPPERS, "block in fsdp1": block_in_fsdp1, "fsdp2": fsdp2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nesting", NESTINGS, ids=" then ".join)
def test_names_are_the_users(nesting):
    model = Model()
    for wrapper in nesting:
        model = EVERY[wrapper](model)
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.1)
    optimizer.attach(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.torque_stats()["names"] == NAMES


def test_what_was_attached_before_it_was_wrapped():
    """The Trainer attaches the model, and accelerate what it makes of it."""
    model = Model()
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.1)
    optimizer.attach(model)
    for wrapped in (nn.parallel.DistributedDataParallel(model), compiled(nn.parallel.DistributedDataParallel(model))):
        optimizer.attach(wrapped)
        assert optimizer.torque_stats()["names"] == NAMES


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which is known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_an_engine_of_deepspeed():
    model = Model()
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.1)
    optimizer.attach(DeepSpeedEngine(model))
    assert optimizer.torque_stats()["names"] == NAMES


@pytest.mark.filterwarnings("ignore")
def test_while_fsdp1_shows_the_full_parameters():
    """It gives other names then."""
    model = fsdp1(block_in_fsdp1(Model()))
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.1)
    with FullyShardedDataParallel.summon_full_params(model):
        optimizer.attach(model)
    assert optimizer.torque_stats()["names"] == NAMES
