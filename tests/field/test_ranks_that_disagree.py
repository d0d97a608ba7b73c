"""What one rank does and another does not: an error on every rank in moments that says what, or no matter at all."""

import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import hf_tam
from hf_tam.sharding import groups
from tests.sharding import comparing, strategies
from tests.sharding.trained import Model, batches_of_steps, loss_of

# One worker runs all distributed tests.
pytestmark = pytest.mark.distributed

SOON_S = 30
"""The process groups wait for 60 s, and their store for 300 s; a busy machine takes a few."""
OURS = {"AdaTAMW": hf_tam.AdaTAMW, "AdaTAM": hf_tam.AdaTAM, "TAM": hf_tam.TAM}


def rank():
    return dist.get_rank()


def shard(name):
    torch.manual_seed(5)
    return strategies.SHARDINGS[name].start(Model(False), "TAM", {}, 1).module


def whole_model():
    torch.manual_seed(5)
    return Model(False)


def backward(module, step=1):
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    loss_of(module(batch, step), batch).backward()


def outcome(function, *args):
    """The error, if any, and the seconds until it came; then all ranks are where they were."""
    began = time.monotonic()
    try:
        function(*args)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return None, time.monotonic() - began


def steps(module, optimizer, count=1):
    for step in range(count):
        optimizer.zero_grad()
        backward(module, step)
        optimizer.step()


def assert_all_refused(results, *parts):
    messages = {message for message, _ in results}
    assert None not in messages, results
    for message in messages:
        for part in parts:
            assert part in message, (part, message)
    assert max(seconds for _, seconds in results) < SOON_S, results


def attached_on_rank_0(name, when):
    """Numbers of two steps, and the collectives of the second, where one rank alone has attached its module."""
    module = shard(name)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    if name.startswith(("fsdp1", "zero")):
        optimizer.attach(module)
    if when == "before" and rank() == 0:
        optimizer.attach(module)
    steps(module, optimizer)
    around = nn.ModuleList([module])  # another module with the same parameters
    if when == "after" and rank() == 0:
        optimizer.attach(around)
    calls = []
    with comparing.counted(calls, optimizer):
        steps(module, optimizer)
    return [called for called, _ in calls], optimizer.torque_stats()["torque"].tolist()


@pytest.mark.parametrize(("name", "when"), [("fsdp2-reshard-True-2", "before"), ("fsdp2-reshard-True-2", "after"),
                                            ("tp-2", "after"), ("fsdp1-full_shard-2", "after")])  # fmt: skip
def test_attached_on_one_rank_only(worlds, name, when):
    """It gives names, which differ then, and changes nothing that is communicated."""
    (calls, torque), (other_calls, other_torque) = worlds(2, "disagree").run(attached_on_rank_0, name, when)
    assert calls == other_calls == ["all_reduce"]
    assert torque == other_torque
    assert any(torque)


def deepspeed_attached_on_rank_0():
    trained = strategies.SHARDINGS["zero2-2"].start(Model(False), "AdaTAMW", {}, 1)
    around, calls = nn.ModuleList([trained.module]), []
    for step, batches in enumerate(batches_of_steps()[:3]):
        if step == 1 and rank() == 0:
            trained.optimizer.attach(around)
        with comparing.counted(calls, trained.optimizer):
            trained.step(batches, step, use=step)
    return [called for called, _ in calls][-2:]


def test_deepspeed_attached_on_one_rank_only(worlds):
    pytest.importorskip("deepspeed")
    assert worlds(2, "disagree").run(deepspeed_attached_on_rank_0) == [["all_reduce", "all_reduce"]] * 2


def fsdp1_attached_on_rank_0():
    module = shard("fsdp1-full_shard-2")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    if rank() == 0:
        optimizer.attach(module)
    return outcome(steps, module, optimizer)


def test_fsdp1_attached_on_one_rank_only(worlds):
    """There it is needed: who has not done it says so to who has."""
    results = worlds(2, "disagree").run(fsdp1_attached_on_rank_0)
    assert_all_refused(results, "call optimizer.attach(model) with the FSDP model")
    assert results[0][0].startswith("on rank 1: ")


def grown_on(name, ranks, later):
    """A param group is added on some ranks, before the first step or after two; then all step on."""
    module = shard(name)
    named = dict(module.named_parameters())
    added = [name for name in named if "up." in name]
    optimizer = hf_tam.AdaTAMW([param for name, param in named.items() if name not in added], lr=0.1)
    if later:
        optimizer.attach(module)
        steps(module, optimizer, 2)
    if rank() in ranks:
        optimizer.add_param_group({"params": [named[name] for name in added], "lr": 0.01})
    optimizer.attach(module)
    calls = []
    with comparing.counted(calls, optimizer):
        result = outcome(steps, module, optimizer)
    return result, [called for called, _ in calls]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("name", "adding"),
    [
        ("fsdp2-reshard-True-2", 0),
        ("fsdp2-reshard-True-2", 1),
        ("fsdp1-full_shard-2", 1),
        ("tp-2", 0),
        pytest.param("fsdp2-tp-4", 3, marks=pytest.mark.slow),
    ],
)
def test_a_param_group_added_on_one_rank(worlds, name, adding, later):
    world = strategies.SHARDINGS[name].world
    results = worlds(world, "disagree").run(grown_on, name, [adding], later)
    assert_all_refused([result for result, _ in results], "the ranks of a shard group hold different parameters",
                       "nothing on rank", f"on rank {adding}", "add_param_group on every rank")  # fmt: skip


def in_another_order(name, alike):
    """Rank 1 lists its parameters from the last to the first; all of them may have the same shape."""
    model = (
        nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)) if alike else nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    )
    module = strategies.fsdp1(ShardingStrategy.FULL_SHARD)(model) if name == "fsdp1" else fully_shard(model)
    weights = [param for name, param in module.named_parameters() if name.endswith("weight")]
    optimizer = hf_tam.AdaTAMW(weights[:: 1 - 2 * rank()], lr=0.1)
    optimizer.attach(module)
    module(torch.ones(2, 5)).sum().backward()
    return outcome(optimizer.step)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_the_same_parameters_in_another_order_on_one_rank(worlds, name, alike):
    results = worlds(2, "disagree").run(in_another_order, name, alike)
    assert_all_refused(
        results, "the ranks of a shard group hold different parameters: number 0 is ", "in the same order"
    )


@pytest.mark.parametrize("name", ["fsdp2-reshard-True-2", "fsdp1-full_shard-2"])
def test_a_param_group_added_on_every_rank(worlds, name):
    """Unfreezing: one collective more of each kind, once."""
    for (message, _), calls in worlds(2, "disagree").run(grown_on, name, [0, 1], True):
        assert message is None
        assert calls == ["all_reduce", "all_gather_object", "all_reduce"]


@pytest.mark.parametrize("name", ["fsdp2-reshard-True-2", "fsdp1-full_shard-2", "tp-2"])
def test_other_objects_for_the_same_parameters_on_one_rank(worlds, name):
    """Param groups that were put together anew, as some resuming code does: the ranks still agree."""
    calls, other_calls = worlds(2, "disagree").run(regrouped_on_rank_0, name)
    assert calls == other_calls == ["all_reduce"]


def reordered_on_rank_0():
    """Two parameters of the same shape change places in the middle of a run."""
    module = fully_shard(nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)))
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.attach(module)
    results = []
    for step in range(2):
        module(torch.ones(2, 5)).sum().backward()
        if step and rank() == 0:
            optimizer.param_groups[0]["params"].reverse()
        results.append(outcome(optimizer.step))
    return results[-1]


def test_parameters_that_change_places_on_one_rank(worlds):
    results = worlds(2, "disagree").run(reordered_on_rank_0)
    assert_all_refused(results, "number 0 is 1.weight (5, 5) torch.float32 on rank 0 and 0.weight")


def regrouped_on_rank_0(name):
    module = shard(name)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.attach(module)
    steps(module, optimizer)
    if rank() == 0:
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [*optimizer.param_groups[0]["params"]]}
        optimizer.logical._selected.clear()
    calls = []
    with comparing.counted(calls, optimizer):
        steps(module, optimizer)
    return [called for called, _ in calls]


def only_on_rank_0(name, attach, first):
    """Rank 1 steps an optimizer of its own that has nothing to do with what is cut."""
    module = shard(name)
    mine = list(module.parameters()) if rank() == 0 else [nn.Parameter(torch.ones(3))]
    optimizer = hf_tam.AdaTAMW(mine, lr=0.1)
    if attach and rank() == 0:
        optimizer.attach(module)
    elif attach:
        module.mine = mine[0]
        optimizer.attach(module)
    backward(module)
    if rank() == 1:
        mine[0].grad = torch.ones(3)
    if rank() != first:
        time.sleep(0.5)
    return outcome(optimizer.step)


@pytest.mark.parametrize(
    ("name", "attach", "first"),
    [
        ("fsdp2-reshard-True-2", True, 0),
        ("fsdp2-reshard-True-2", True, 1),
        ("fsdp2-reshard-True-2", False, 1),
        ("tp-2", False, 1),
    ],
)
def test_an_optimizer_without_anything_that_is_cut_on_one_rank(worlds, name, attach, first):
    results = worlds(2, "disagree").run(only_on_rank_0, name, attach, first)
    assert_all_refused(results, "the optimizer of rank 1 holds none of the parameters that are cut over ranks [0, 1]")


def without_empty_slices():
    """What some training code does under FSDP1: leave out what has no elements here."""
    module = shard("fsdp1-full_shard-2")
    optimizer = hf_tam.AdaTAMW([param for param in module.parameters() if param.numel()], lr=0.1)
    optimizer.attach(module)
    return outcome(steps, module, optimizer)


def test_the_empty_slices_of_fsdp1_left_out(worlds):
    results = worlds(2, "disagree").run(without_empty_slices)
    assert_all_refused(results, "the ranks of a shard group hold different parameters")


ARGUMENTS = [
    ("AdaTAMW", {"scope": "model"}, {}, "values of scope: 'model' for .* on rank 0 and 'tensor' on rank 1"),
    ("AdaTAMW", {}, {"max_grad_norm": 1.0}, "values of max_grad_norm: None for .* on rank 0 and 1.0 on rank 1"),
    ("AdaTAMW", {}, {"nonfinite": "raise"}, "values of nonfinite: 'skip' for .* on rank 0 and 'raise' on rank 1"),
    ("TAM", {"step_size": "paper"}, {}, "values of step_size: 'paper' for .* on rank 0 and 'sgd' on rank 1"),
    ("TAM", {}, {"torque_steps": 2}, "values of torque_steps: None for .* on rank 0 and 2 on rank 1"),
    ("AdaTAMW", {"gamma": 0.5}, {}, "values of gamma: 0.5 for .* on rank 0 and 0.9 on rank 1"),
    ("TAM", {}, {"damping_eps": 0.5}, "values of damping_eps: 1e-08 for .* on rank 0 and 0.5 on rank 1"),
    ("AdaTAM", {"max_grad_norm": 1.0, "weight_decay": 0.1}, {"max_grad_norm": 1.0},
     "rank 0 has a weight decay, before which max_grad_norm takes a norm of its own, and rank 1 has not"),
]  # fmt: skip


def other_arguments(name, optimizer_name, arguments, later):
    module = shard(name)
    mine = arguments[rank()]
    optimizer = OURS[optimizer_name](module.parameters(), **({"lr": 0.1} if later else {"lr": 0.1, **mine}))
    optimizer.attach(module)
    if later:
        steps(module, optimizer, 2)
        optimizer.param_groups[0].update(mine)
    return outcome(steps, module, optimizer, 2)


@pytest.mark.parametrize(
    ("optimizer_name", "first", "second", "message", "later"),
    [(*arguments, later) for later in (False, True) for arguments in ARGUMENTS],
)
def test_other_arguments_on_one_rank(worlds, optimizer_name, first, second, message, later):
    """What decides how often the ranks communicate, or what they make of the sums."""
    name = "fsdp1-full_shard-2" if optimizer_name == "AdaTAM" else "fsdp2-reshard-True-2"
    results = worlds(2, "disagree").run(other_arguments, name, optimizer_name, (first, second), later)
    assert_all_refused(results)
    for found, _ in results:
        assert re.search(message, found), found


def gamma_by_a_schedule():
    """Moved on all ranks alike, as a schedule does."""
    module = shard("fsdp2-reshard-True-2")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    for step in range(4):
        optimizer.param_groups[0]["gamma"] = 0.5 + 0.1 * step
        steps(module, optimizer)
    return optimizer.torque_stats()["torque"].tolist()


def test_a_schedule_that_moves_gamma(worlds):
    first, second = worlds(2, "disagree").run(gamma_by_a_schedule)
    assert first == second
    assert any(first)


def one_of_four(name):
    """On a mesh of two axes the last rank shares nothing with the first, and must not be left waiting."""
    module = shard(name)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.attach(module)
    steps(module, optimizer)
    if rank() == 0:
        optimizer.param_groups[0]["nonfinite"] = "raise"
    first = outcome(steps, module, optimizer)
    if rank() == 0:
        optimizer.param_groups[0]["nonfinite"] = "skip"
    return first, outcome(steps, module, optimizer)


@pytest.mark.parametrize("name", ["fsdp2-tp-4"])
def test_one_of_four_ranks(worlds, name):
    """All are told, and when it is set right all go on."""
    results = worlds(4, "disagree").run(one_of_four, name)
    assert_all_refused([first for first, _ in results], "different values of nonfinite: 'raise'")
    assert [message for _, (message, _) in results] == [None] * 4


def a_chain_of_groups():
    """Ranks 0 and 1 share a tensor, and ranks 1 and 2 another, which rank 2 has left out."""
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [1, 2])]
    params = [
        nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False))
        for mesh in meshes
        if rank() in mesh.mesh.tolist()
    ]
    if rank() >= 2:
        params = [nn.Parameter(torch.ones(3))]
    for param in params:
        param.grad = torch.ones_like(param)
    result = outcome(hf_tam.AdaTAMW(params, lr=0.1).step)
    dist.barrier()
    return result


def test_a_rank_that_has_agreed_already_is_told(worlds):
    """Rank 0 knows nothing of rank 2, and waits for rank 1 in the sum of its own step."""
    *results, other = worlds(4, "disagree").run(a_chain_of_groups)
    assert_all_refused(results, "the optimizer of rank 2 holds none of the parameters that are cut over ranks [1, 2]")
    assert other[1] < SOON_S


def loaded_on(ranks):
    module = shard("fsdp1-full_shard-2")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.attach(module)
    steps(module, optimizer)
    if rank() in ranks:
        optimizer.load_state_dict(optimizer.state_dict())
    return outcome(steps, module, optimizer)


def test_a_state_loaded_on_one_rank(worlds):
    """Under FSDP1 the ranks tell one another the numbers of what they have loaded."""
    assert_all_refused(worlds(2, "disagree").run(loaded_on, [1]), "rank 1 has loaded a state and rank 0 has not")
    assert [message for message, _ in worlds(2, "disagree").run(loaded_on, [0, 1])] == [None, None]


def cannot_step_on_rank_1():
    """In the middle of a run rank 1 has a parameter that no optimizer of ours can step; then it has not any more."""
    module = shard("fsdp2-reshard-True-2")
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
    optimizer.attach(module)
    steps(module, optimizer)
    flat = torch.zeros(3)
    flat._is_flat_param = True
    if rank() == 1:
        optimizer.param_groups[0]["params"].append(flat)
    first = outcome(steps, module, optimizer)
    if rank() == 1:
        optimizer.param_groups[0]["params"].pop()
    return first, outcome(steps, module, optimizer)


def test_a_parameter_that_one_rank_cannot_step(worlds):
    results = worlds(2, "disagree").run(cannot_step_on_rank_1)
    assert_all_refused([first for first, _ in results], "FSDP1 put it in a flat parameter")
    assert results[0][0][0].startswith("on rank 1: ")
    assert [message for _, (message, _) in results] == [None, None]


def on_an_accelerator(adding):
    """As `grown_on`, where looking at a number would wait for a device, so that who has not asked does not look."""
    module = shard("fsdp2-reshard-True-2")
    named = dict(module.named_parameters())
    optimizer = hf_tam.AdaTAMW([param for name, param in named.items() if "up." not in name], lr=0.1)
    optimizer.attach(module)
    with mock.patch.object(groups, "_is_readable", return_value=False):
        steps(module, optimizer, 2)
        if rank() in adding:
            optimizer.add_param_group({"params": [param for name, param in named.items() if "up." in name]})
        before = held(optimizer)
        message, _ = outcome(steps, module, optimizer)
        return message, all(map(torch.equal, before, held(optimizer)))


def held(optimizer):
    """What this rank has of the parameters of the first group, and of their states."""
    params = optimizer.param_groups[0]["params"]
    tensors = [*params, *(value for param in params for value in optimizer.state.get(param, {}).values())]
    return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]


def test_a_param_group_added_on_one_rank_with_an_accelerator(worlds):
    (asked, unchanged), (message, passed_by) = worlds(2, "disagree").run(on_an_accelerator, [0])
    assert "were changed on this rank, and not on every rank" in asked
    assert message is None
    assert unchanged
    assert passed_by


def test_a_param_group_added_on_every_rank_with_an_accelerator(worlds):
    assert worlds(2, "disagree").run(on_an_accelerator, [0, 1]) == [(None, False)] * 2


def several_optimizers(name, lagging):
    """What ranks may well do differently: an optimizer more on rank 0, stepped before those that all have."""
    module, calls = shard(name), []
    params = list(module.parameters())
    optimizers = [hf_tam.AdaTAMW(params[:4], lr=0.1), hf_tam.TAM(params[4:], lr=0.1)]
    for optimizer in optimizers:
        optimizer.attach(module)
    probe = nn.Parameter(torch.ones(3))
    if rank() == 0:
        probe.grad = torch.ones(3)
        hf_tam.AdaTAMW([probe]).step()
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(module, step)
        if rank() == lagging:
            time.sleep(1)
        for optimizer in optimizers:
            with comparing.counted(calls, optimizer):
                optimizer.step()
    return [called for called, _ in calls]


@pytest.mark.parametrize("lagging", [0, 1])
def test_several_optimizers_and_one_more_on_one_rank(worlds, lagging):
    for calls in worlds(2, "several").run(several_optimizers, "fsdp2-reshard-True-2", lagging):
        assert calls == ["all_gather_object", "all_reduce"] * 2 + ["all_reduce"] * 2


def probe(count=1, **options):
    """A small model that one rank alone trains."""
    module = nn.Linear(3, 2)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1, **options)
    for _ in range(count):
        module(torch.ones(2, 3)).sum().backward()
        optimizer.step()


def probes_on_one_rank(name, first, second, late):
    """Probes before the first model, and between it and a second one. How far the torques are from one process."""
    differences = []
    for count in (first, second):
        module, twin = shard(name), whole_model()
        optimizers = [hf_tam.AdaTAMW(part.parameters(), lr=0.1) for part in (module, twin)]
        if late:  # only now, when the optimizer is there
            del optimizers[0]
        if rank() == 0:
            for _ in range(count):
                probe(2)
        if late:
            time.sleep(0.5 * rank())
            optimizers.insert(0, hf_tam.AdaTAMW(module.parameters(), lr=0.1))
        if name.startswith("fsdp1"):
            optimizers[0].attach(module)
        steps(module, optimizers[0], 3)
        steps(twin, optimizers[1], 3)
        torques = [optimizer.torque_stats()["torque"] for optimizer in optimizers]
        differences.append((torques[0] - torques[1]).abs().max().item())
    return differences


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["fsdp2-reshard-True-2", "fsdp1-full_shard-2", "tp-2"])
def test_optimizers_that_one_rank_has_beside(worlds, name, late):
    """What is stepped first on one rank is not what is stepped first on the other; nobody waits for it."""
    began = time.monotonic()
    for differences in worlds(2, "beside").run(probes_on_one_rank, name, 1, 2, late):
        assert max(differences) <= 1e-4  # gradients of flat parameters differ by rounding
    assert time.monotonic() - began < 60
