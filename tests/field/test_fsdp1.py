"""FSDP1 as users meet it: wrapped too late, flat, two models in one optimizer, statistics after a load."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import hf_tam

OPTIMIZERS = [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM]


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def fsdp1(module, **options):
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    return FullyShardedDataParallel(module, **options)


def backward(*modules, seed=0):
    """A batch that every rank and the unsharded twin see alike, so that their gradients are the same."""
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    sum(module(batch).square().mean() for module in modules).backward()


def step(optimizer, *modules, seed=0):
    backward(*modules, seed=seed)
    optimizer.step()
    for module in modules:
        module.zero_grad()


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_flat_parameters_are_refused_when_attached(one_rank, cls, when):
    """Built before, it would train nothing: AdamW does, without a word. Built after, one angle would be for all."""
    module = model()
    optimizer = cls(module.parameters(), lr=0.1)
    control = torch.optim.AdamW(module.parameters(), lr=0.1)
    flat = fsdp1(module, use_orig_params=False)
    if when == "after":
        optimizer = cls(flat.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="use_orig_params=True"):
        optimizer.attach(flat)
    before = [parameter.detach().clone() for parameter in flat.parameters()]
    step(control, flat)
    assert all(torch.equal(old, new) for old, new in zip(before, flat.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_a_flat_model_beside_the_one_that_is_trained(one_rank):
    """A frozen teacher: attaching it is a mistake, but not that one."""
    teacher = fsdp1(nn.Linear(2, 9), use_orig_params=False)
    student = model()
    optimizer = hf_tam.AdaTAMW(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="owns none of this optimizer's parameters"):
        optimizer.attach(teacher)
    optimizer.attach(nn.ModuleList([teacher, student]))
    step(optimizer, student)
    assert optimizer.torque_stats()["names"][0] == "1.0.weight"


def run(case):
    """What a rank says: the result of a function of this module, or its refusal."""
    try:
        return globals()[case]()
    except RuntimeError as error:
        return str(error)


def wrapped_between_two_steps(*, attach, parameters=lambda module: module.parameters()):
    twin, module = model(), model()
    optimizers = [hf_tam.AdaTAMW(parameters(part), lr=0.05) for part in (twin, module)]
    step(optimizers[0], twin)
    step(optimizers[1], module)
    for optimizer in optimizers:
        optimizer.state.clear()
    sharded = fsdp1(module)
    if attach:
        optimizers[1].attach(sharded)
    for seed in range(1, 5):
        step(optimizers[0], twin, seed=seed)
        step(optimizers[1], sharded, seed=seed)
    left, right = (optimizer.torque_stats()["torque"] for optimizer in optimizers)
    return (left - right).abs().max().item(), left.abs().max().item()


def without_attach():
    return wrapped_between_two_steps(attach=False)


def with_attach():
    return wrapped_between_two_steps(attach=True)


def one_bias_without_attach():
    """The first rank holds all of it, before and after: its shape does not tell."""
    return wrapped_between_two_steps(attach=False, parameters=lambda module: [module[0].bias])


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["without_attach", "one_bias_without_attach"])
def test_wrapped_after_steps_without_attach_is_refused(worlds, case):
    for message in worlds(2).run(run, case):
        assert "call optimizer.attach(model) with the FSDP model" in message


@pytest.mark.distributed
def test_wrapped_after_steps_and_attached_is_exact(worlds):
    for difference, torque in worlds(2).run(run, "with_attach"):
        assert difference <= 1e-6
        assert torque > 0.01


def two_models(*, attached=2):
    twins, models = [model(1), model(2)], [fsdp1(model(1)), fsdp1(model(2))]
    optimizers = [
        hf_tam.AdaTAMW([parameter for part in parts for parameter in part.parameters()], lr=0.05)
        for parts in (twins, models)
    ]
    for part in models[:attached]:
        optimizers[1].attach(part)
    for seed in range(5):
        step(optimizers[0], *twins, seed=seed)
        step(optimizers[1], *models, seed=seed)
    left, right = (optimizer.torque_stats()["torque"] for optimizer in optimizers)
    parameters = [parameter.detach() for twin in twins for parameter in twin.parameters()]
    sharded = []
    for part in models:
        with FullyShardedDataParallel.summon_full_params(part, writeback=False):
            sharded += [parameter.detach().clone() for parameter in part.parameters()]
    return (
        (left - right).abs().max().item(),
        left.abs().max().item(),
        max((one - other).abs().max().item() for one, other in zip(parameters, sharded, strict=True)),
    )


def two_models_of_which_one_is_attached():
    return two_models(attached=1)


@pytest.mark.distributed
def test_one_optimizer_over_two_models(worlds):
    for torque_difference, torque, parameter_difference in worlds(2).run(run, "two_models"):
        assert torque_difference <= 1e-6
        assert torque > 0.01
        assert parameter_difference <= 1e-5


@pytest.mark.distributed
def test_one_optimizer_over_two_models_of_which_one_is_attached(worlds):
    for message in worlds(2).run(run, "two_models_of_which_one_is_attached"):
        assert "parameter 4 is a slice that FSDP1 made" in message
        assert "call optimizer.attach(model) with the FSDP model that it belongs to, too" in message


def statistics_after_a_load():
    module = fsdp1(model(), sharding_strategy=ShardingStrategy.FULL_SHARD)
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05)
    optimizer.attach(module)
    for seed in range(3):
        step(optimizer, module, seed=seed)
    saved = FullyShardedDataParallel.optim_state_dict(module, optimizer)
    expected = optimizer.torque_stats()["torque"]

    fresh = fsdp1(model(), sharding_strategy=ShardingStrategy.FULL_SHARD)
    resumed = hf_tam.AdaTAMW(fresh.parameters(), lr=0.05)
    resumed.attach(fresh)
    resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(fresh, resumed, saved))
    loaded = resumed.torque_stats()
    step(resumed, fresh, seed=3)
    stepped = resumed.torque_stats()["torque"]
    return [values.tolist() for values in (expected, loaded["torque"], loaded["damping"], stepped)]


def statistics_before_a_step():
    module = fsdp1(model())
    optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.05)
    optimizer.attach(module)
    stats = optimizer.torque_stats()
    return [stats["torque"].tolist(), stats["damping"].tolist()]


@pytest.mark.distributed
def test_statistics_between_a_load_and_the_next_step(worlds):
    """A rank that holds nothing of a tensor cannot know its torque yet; it must not say that it is neutral."""
    results = worlds(2).run(run, "statistics_after_a_load")
    for expected, loaded, damping, stepped in results:
        known = [index for index, torque in enumerate(loaded) if not math.isnan(torque)]
        assert 0 < len(known) < 4
        for index, torque in enumerate(expected):
            assert index not in known or loaded[index] == torque
            assert index not in known or damping[index] == pytest.approx((1 + torque) / 2)
            assert index in known or math.isnan(damping[index])
        assert not any(map(math.isnan, stepped))
    assert results[0][-1] == results[1][-1]


@pytest.mark.distributed
def test_statistics_before_the_first_step(worlds):
    assert worlds(2).run(run, "statistics_before_a_step") == [[[0.0] * 4, [0.5] * 4]] * 2
