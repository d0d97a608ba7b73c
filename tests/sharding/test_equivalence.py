"""The same angles however a tensor is cut: 20 steps of a sharded model against its unsharded twin."""

import pytest
import torch

from tests.sharding import strategies

# One worker runs them all, so that the worlds are started once.
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("worlds")]

# Torques are sums in fp64, rounded to fp32 once a step; parameters differ by the order in which gradients are summed.
TORQUE = 1e-6
PARAMETERS = 1e-5
OPTIONS = {"AdaTAMW": {"weight_decay": 0.1}, "AdaTAM": {"weight_decay": 0.1}, "TAM": {"weight_decay": 0.1}}
CASES = [pytest.param(sharding, id=sharding.name) for sharding in strategies.SHARDINGS]
# AdaTAMW everywhere; what differs in the others (coupled decay in the sums, no scale) in the smallest worlds.
PRODUCT = [
    pytest.param(sharding, name, scope, id=f"{sharding.name}-{name}-{scope}")
    for sharding in strategies.SHARDINGS
    for name in OPTIONS
    for scope in ("tensor", "model")
    if name == "AdaTAMW" or (sharding.world == 2 or sharding.groups == 2)
]


def in_world(name, optimizer_name, options, cut):
    sharding = next(sharding for sharding in strategies.SHARDINGS if sharding.name == name)
    return strategies.run(optimizer_name, sharding, options, cut=cut)


@pytest.mark.parametrize(("sharding", "optimizer_name", "scope"), PRODUCT)
def test_sharded_is_unsharded(worlds, sharding, optimizer_name, scope):
    options = {**OPTIONS[optimizer_name], "scope": scope}
    for result in worlds(sharding.world).run(in_world, sharding.name, optimizer_name, options, False):
        assert set(result["kinds"]) == {kind.__name__ for kind in sharding.kinds}
        assert result["torque"] <= TORQUE, result
        assert result["parameters"] <= PARAMETERS, result
        assert result["reduces"] == sharding.groups
        assert result["bytes"] <= 32 * result["tensors"]
        assert max(result["damping"]) - min(result["damping"]) > 0.01 or scope == "model"


@pytest.mark.parametrize("sharding", [case for case in CASES if case.values[0].groups])
def test_without_the_reduction_it_is_another_optimizer(worlds, sharding):
    results = worlds(sharding.world).run(in_world, sharding.name, "AdaTAMW", {}, True)
    assert max(result["torque"] for result in results) > 100 * TORQUE
    assert max(result["parameters"] for result in results) > 100 * PARAMETERS


def different_parameters():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    width = 4 + torch.distributed.get_rank()
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, width))
    local = torch.distributed.tensor.DTensor.from_local
    from torch.distributed.tensor import Shard

    parameters = [torch.nn.Parameter(local(p.detach(), mesh, [Shard(0)], run_check=False)) for p in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    import hf_tam

    try:
        hf_tam.AdaTAMW(parameters).step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_get_the_first_difference(worlds):
    for message in worlds(2).run(different_parameters):
        assert "number 2 is parameter 2 (8, 4)" in message
        assert "(10, 4)" in message


def dcp_state(name):
    """Bits of a model trained after its state_dict was asked for, and of one that was left alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    import hf_tam

    sharding = next(sharding for sharding in strategies.SHARDINGS if sharding.name == name)
    trained = []
    for asked in (True, False):
        model = sharding.shard(strategies.Model(False))
        optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05)
        if asked:
            get_optimizer_state_dict(model, optimizer)
        for step in range(4):
            model(torch.ones(2, 5), step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([parameter.full_tensor() for parameter in model.parameters()])
    return all(torch.equal(left, right) for left, right in zip(*trained, strict=True))


@pytest.mark.parametrize("name", ["fsdp2-reshard-True-2", "hsdp-4"])
def test_asking_for_a_state_dict_changes_nothing(worlds, name):
    world = next(sharding.world for sharding in strategies.SHARDINGS if sharding.name == name)
    assert worlds(world).run(dcp_state, name) == [True] * world


def steps_without_gradients(name):
    """A step that some ranks, or all, have no gradient for; every rank must come back from it."""
    import hf_tam

    sharding = next(sharding for sharding in strategies.SHARDINGS if sharding.name == name)
    model = sharding.shard(strategies.Model(False))
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05)
    optimizer.attach(model)
    model(torch.ones(2, 5), 1).square().sum().backward()
    optimizer.step()
    counts = [state["step"].item() for state in optimizer.state.values()]
    optimizer.zero_grad()
    optimizer.step()
    return counts == [state["step"].item() for state in optimizer.state.values()]


@pytest.mark.parametrize("name", ["fsdp1-full_shard-2", "fsdp1-full_shard-4", "fsdp2-reshard-True-2"])
def test_a_step_without_any_gradient(worlds, name):
    world = next(sharding.world for sharding in strategies.SHARDINGS if sharding.name == name)
    assert worlds(world).run(steps_without_gradients, name) == [True] * world


def nan_on_one_rank(name):
    """What each rank did with a NaN that only rank 1 has seen."""
    import hf_tam

    sharding = next(sharding for sharding in strategies.SHARDINGS if sharding.name == name)
    model = sharding.shard(strategies.Model(False))
    optimizer = hf_tam.AdaTAMW(model.parameters(), lr=0.05)
    optimizer.attach(model)
    model(torch.ones(2, 5), 1).square().sum().backward()
    if torch.distributed.get_rank() == 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                if local.numel():
                    local.view(-1)[0] = float("nan")
                    break
    optimizer.step()
    steps = [optimizer.state[p]["step"].item() if p in optimizer.state else 0.0 for p in model.parameters()]
    return optimizer.skipped, steps


@pytest.mark.filterwarnings("ignore:.*were skipped")
@pytest.mark.parametrize("name", ["fsdp1-full_shard-2", "fsdp2-reshard-True-2", "hsdp-4"])
def test_nan_on_one_rank_is_one_decision(worlds, name):
    world = next(sharding.world for sharding in strategies.SHARDINGS if sharding.name == name)
    decisions = worlds(world).run(nan_on_one_rank, name)
    sharing = decisions if not name.startswith("hsdp") else decisions[:2]  # replicas are not summed
    assert sharing[0][0] == 1
    assert all(decision == sharing[0] for decision in sharing)
