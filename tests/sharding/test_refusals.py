"""What keeps a tensor in a way that is not known is refused by name, never given the angle of a part."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial

import hf_tam
from hf_tam.sharding import select_reducer
from hf_tam.sharding.ownership import OwnedParameters
from hf_tam.sharding.zero import _Fragment, _require_cover, _require_values

OPTIMIZERS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


@pytest.fixture
def one_rank():
    """A process group of one: the wrappers change the parameters as they would on many."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def step_once(optimizer, module):
    module(torch.ones(3, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_flat_parameters_of_fsdp1(one_rank, optimizer_class):
    sharded = FullyShardedDataParallel(model(), use_orig_params=False, device_id=torch.device("cpu"))
    optimizer = optimizer_class(sharded.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="wrap the model with use_orig_params=True"):
        step_once(optimizer, sharded)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_fsdp1_without_its_module(one_rank, optimizer_class):
    sharded = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = optimizer_class(sharded.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in sharded.parameters()]
    with pytest.raises(RuntimeError, match=r"call optimizer\.attach\(model\)"):
        step_once(optimizer, sharded)
    assert all(torch.equal(p, old) for p, old in zip(sharded.parameters(), before, strict=True))
    optimizer.attach(sharded)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(sharded.parameters(), before, strict=True))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_parameter_with_partial_values(one_rank, optimizer_class):
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    parameter.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"Partial.* on mesh axis 0"):
        optimizer_class([parameter], lr=0.1).step()


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


def test_parameters_on_an_xla_device():
    class OnXla(torch.Tensor):
        @property
        def device(self):
            return torch.device("xla", 0)

    known = OwnedParameters()
    parameter = torch.zeros(3).as_subclass(OnXla)
    known.add([parameter])
    with pytest.raises(RuntimeError, match=r"parameter 0 .*XLA.*SPMD.*use one of those, or --optim adamw_torch"):
        select_reducer([parameter], known, names=[None])


def test_a_rank_without_the_rest_of_a_buffer_is_refused():
    """A partition map with a gap: what the wrapper says is checked, not believed."""
    whole = torch.zeros(6)
    parts = [_Fragment(0, 0, 0, 2, True), _Fragment(0, 3, 0, 3, True)]
    with pytest.raises(RuntimeError, match=r"does not cover parameter 0 \(6,\): 2 of 6 elements"):
        _require_cover(0, whole, parts)
    _require_cover(0, whole, [_Fragment(0, 2, 0, 4, True), _Fragment(0, 0, 9, 2, True)])
    with pytest.raises(RuntimeError, match=r"does not hold parameter 0 .*round_robin_gradients"):
        _require_values(0, whole, [_Fragment(0, 0, 0, 6, False)])


def test_parameters_that_deepspeed_has_given_back_are_whole():
    """What an engine that is gone has left on the parameters does not make them parts."""
    module = model()
    for parameter in module.parameters():
        parameter._hp_mapping = None
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    step_once(optimizer, module)
    step_once(optimizer, module)
    assert optimizer.torque_stats()["torque"].any()
    assert "torque" in optimizer.state_dict()["state"][0]
