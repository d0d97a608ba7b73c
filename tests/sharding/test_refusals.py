"""Real wrappers that leave a part of a tensor on each rank are refused by name, never given the angle of a part."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import hf_tam

OPTIMIZERS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


@pytest.fixture
def one_rank():
    """A process group of one: the wrappers change the parameters as they would on many."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def shard_fsdp1(module):
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def shard_fsdp1_flat(module):
    return FullyShardedDataParallel(module, use_orig_params=False, device_id=torch.device("cpu"))


def shard_fsdp2(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


def shard_tensor_parallel(module):
    return parallelize_module(module, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


SHARDINGS = [
    (shard_fsdp1, "FSDP1"),
    (shard_fsdp1_flat, "FSDP1"),
    (shard_fsdp2, "DTensor"),
    (shard_tensor_parallel, "DTensor"),
]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize(("shard", "named"), SHARDINGS)
def test_a_sharded_model_is_refused(one_rank, shard, named, optimizer_class):
    sharded = shard(model())
    optimizer = optimizer_class(sharded.parameters(), lr=0.1)
    sharded(torch.ones(3, 4)).sum().backward()
    before = [parameter.detach().clone() for parameter in sharded.parameters()]
    with pytest.raises(RuntimeError, match=rf"{named}.*use DDP"):
        optimizer.step()
    for parameter, old in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(
            parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter,
            old.full_tensor() if hasattr(old, "full_tensor") else old,
        )


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_sharding_after_the_optimizer_was_built_is_refused(one_rank, optimizer_class):
    """FSDP2 puts other parameters in the module; accelerate hands them to the optimizer afterwards."""
    module = model()
    optimizer = optimizer_class(module.parameters(), lr=0.1)
    shard_fsdp2(module)
    optimizer.param_groups[0]["params"] = list(module.parameters())
    module(torch.ones(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="DTensor"):
        optimizer.step()


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_ddp_needs_no_reduction(one_rank, optimizer_class, monkeypatch):
    wrapped = nn.parallel.DistributedDataParallel(model())
    optimizer = optimizer_class(wrapped.parameters(), lr=0.1)
    wrapped(torch.ones(3, 4)).sum().backward()

    def refuse(*args, **kwargs):
        raise AssertionError("a collective was called")

    for name in ("all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    before = [parameter.detach().clone() for parameter in wrapped.parameters()]
    optimizer.step()
    assert not any(torch.equal(parameter, old) for parameter, old in zip(wrapped.parameters(), before, strict=True))
