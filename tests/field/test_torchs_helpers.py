"""What torch.distributed.checkpoint.state_dict makes of groups and states, in one process; AdamW beside ours."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.field.loading import CLASSES, OURS, is_ours, step

EVERY_CLASS = pytest.mark.parametrize("name", [*OURS, "AdamW"])
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def build(name, groups=lambda model: model.parameters(), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, CLASSES[name](groups(model), **{"lr": 0.01, **options})


def assert_goes_on(first, second):
    """Both go on from the same parameters, bit for bit."""
    second[0].load_state_dict(first[0].state_dict())
    for _, optimizer in (first, second):
        step(optimizer, 99)
    for mine, theirs in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@EVERY_CLASS
@pytest.mark.parametrize("options", [None, FLAT, StateDictOptions(full_state_dict=True)])
def test_there_and_back(name, options):
    first, second = build(name), build(name)
    for seed in range(3):
        step(first[1], seed)
    saved = get_optimizer_state_dict(*first, options=options)
    set_optimizer_state_dict(*second, copy.deepcopy(saved), options=options)
    assert_goes_on(first, second)


@EVERY_CLASS
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_group_without_parameters(name, place):
    """torch 2.13 loses the hyperparameters of one that stands first, and AdamW its next step; ours fills them in."""

    def groups(model):
        empty = {"params": [], "lr": 0.5}
        full = {"params": list(model.parameters()), "lr": 0.02}
        return [empty, full] if place == "first" else [full, empty]

    first, second = build(name, groups), build(name, groups)
    for seed in range(3):
        step(first[1], seed)
    set_optimizer_state_dict(*second, copy.deepcopy(get_optimizer_state_dict(*first)))
    if place == "first" and not is_ours(name):
        with pytest.raises(KeyError):
            step(second[1], 99)
        return
    assert_goes_on(first, second)
    assert [group["lr"] for group in second[1].param_groups] == ([0.5, 0.02] if place == "first" else [0.02, 0.5])


@EVERY_CLASS
def test_a_flattened_checkpoint_without_the_state_of_one(name):
    """torch puts {} for every state that is missing; AdamW dies of a TypeError, ours says of which parameter."""
    first, second = build(name), build(name)
    for parameter in first[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    first[0][1].bias.grad = None
    first[1].step()
    saved = get_optimizer_state_dict(*first, options=FLAT)
    with pytest.raises(ValueError if is_ours(name) else TypeError, match=r"1\.bias" if is_ours(name) else "dict"):
        set_optimizer_state_dict(*second, saved, options=FLAT)


@EVERY_CLASS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_in_a_distributed_checkpoint(name, tensor_lr, tmp_path):
    """The rate and where it started come back; no word is said of what the schedule moved."""

    def with_schedule():
        model, optimizer = build(name, lr=torch.tensor(0.01) if tensor_lr else 0.01)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))

    model, optimizer, scheduler = with_schedule()
    for seed in range(3):
        step(optimizer, seed)
        scheduler.step()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
        another, resumed, _ = with_schedule()
        state = {"optimizer": get_optimizer_state_dict(another, resumed)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_optimizer_state_dict(another, resumed, state["optimizer"])
    assert float(resumed.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    assert float(resumed.param_groups[0]["initial_lr"]) == pytest.approx(0.01)
    assert_goes_on((model, optimizer), (another, resumed))
