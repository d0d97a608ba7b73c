"""Hooks that wrap, rename and extend what is saved and loaded; torch.optim's AdamW and SGD beside ours."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch

import hf_tam
from tests.field.loading import COUNTERPARTS, NAMES, OURS, Run, is_ours, step

EVERY_CLASS = pytest.mark.parametrize("name", [*OURS, "AdamW", "SGD"])
EVERY_OURS = pytest.mark.parametrize("name", OURS)


def wrapped(optimizer, state_dict):
    return {"optimizer": state_dict, "format": 2}


def unwrapped(optimizer, state_dict):
    return state_dict["optimizer"]


def renamed(optimizer, state_dict):
    state_dict["states"] = state_dict.pop("state")
    state_dict["groups"] = state_dict.pop("param_groups")


def named_as_before(optimizer, state_dict):
    state_dict["state"] = state_dict.pop("states")
    state_dict["param_groups"] = state_dict.pop("groups")


def by_name(optimizer, state_dict):
    """Keys that outlive another order of the parameters; the recipe in torch's own documentation."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    names = dict(zip(keys, NAMES, strict=True))
    return {
        "state": {names[key]: state for key, state in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [names[key] for key in group["params"]]} for group in state_dict["param_groups"]
        ],
    }


def by_position(optimizer, state_dict):
    keys = dict(zip(NAMES, range(3), strict=True))
    return {
        "state": {keys[name]: state for name, state in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [keys[name] for name in group["params"]]} for group in state_dict["param_groups"]
        ],
    }


def without_moments(optimizer, state_dict):
    state_dict["state"] = {}


def ordered(optimizer, state_dict):
    return OrderedDict(sorted(state_dict.items()))


WAYS = {
    "wrapped": (wrapped, unwrapped),
    "renamed in place": (renamed, named_as_before),
    "by name and back": (by_name, by_position),
    "by name": (by_name, None),
    "ordered": (ordered, None),
    "shrunk": (without_moments, None),
}


@EVERY_CLASS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prepend", [False, True])
def test_what_one_hook_makes_of_a_state_dict_another_undoes(name, way, prepend):
    run = Run(name)
    after, before = WAYS[way]
    run.optimizer.register_state_dict_post_hook(after, prepend=prepend)
    buffer = io.BytesIO()
    torch.save(run.optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = run.fresh()
    if before is not None:
        resumed.register_load_state_dict_pre_hook(before, prepend=prepend)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    if way == "shrunk":
        assert not resumed.state
    else:
        run.assert_goes_on(resumed)


@EVERY_CLASS
def test_hooks_see_the_whole_state(name):
    """A post-hook of the load runs when everything stands as it was saved, in fp32 where that is fp32."""
    run = Run(name, dtype=torch.bfloat16)
    seen = []

    def look(optimizer):
        seen.extend({key: value.clone() for key, value in state.items()} for state in optimizer.state.values())

    resumed = run.fresh()
    resumed.register_load_state_dict_post_hook(look, prepend=True)
    resumed.load_state_dict(run.saved)
    assert len(seen) == 3
    for mine, theirs in zip(seen, run.saved["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], value) and mine[key].dtype == value.dtype for key, value in theirs.items())


@EVERY_CLASS
def test_a_hook_that_asks_for_a_state_dict_while_loading(name):
    """Logging what was loaded."""
    run = Run(name)
    seen = []
    resumed = run.fresh()
    resumed.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.state_dict()))
    resumed.load_state_dict(run.saved)
    assert seen[0]["state"].keys() == run.saved["state"].keys()
    run.assert_goes_on(resumed)


@EVERY_CLASS
def test_a_pre_hook_that_edits_what_is_loaded(name):
    """Another learning rate, or a parameter's state left out, as when a head is replaced."""
    run = Run(name)

    def edit(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.5
        del state_dict["state"][1]
        return state_dict

    resumed = run.fresh(lr=0.5)
    resumed.register_load_state_dict_pre_hook(edit)
    resumed.load_state_dict(run.saved)
    assert resumed.param_groups[0]["lr"] == 0.5
    assert len(resumed.state) == 2
    step(resumed, 99)


@EVERY_CLASS
def test_our_own_hooks_do_not_stay(name):
    """Also where a load or a save fails."""
    run = Run(name)

    def fail(*_):
        raise KeyError("a hook of the user's")

    handle = run.optimizer.register_state_dict_post_hook(fail)
    with pytest.raises(KeyError, match="user's"):
        run.optimizer.state_dict()
    handle.remove()
    with pytest.raises((ValueError, KeyError)):
        run.optimizer.load_state_dict({"state": {}, "param_groups": []})
    hooks = [value for key, value in vars(run.optimizer).items() if key.startswith("_optimizer_") and "hooks" in key]
    assert len(hooks) >= 6
    assert not any(hooks)


@EVERY_OURS
def test_an_export_is_what_torch_loads_whatever_hooks_there_are(name):
    run, twin = Run(name), Run(name)
    run.optimizer.register_state_dict_post_hook(wrapped)
    run.optimizer.state["sampler"] = {"epoch": 4}
    for state in run.saved["state"].values():
        state["mine"] = torch.ones(2)
    exported = hf_tam.export_torch_state_dict(run.optimizer)
    theirs = run.fresh(COUNTERPARTS[name])
    theirs.load_state_dict(exported)
    plain = twin.fresh(COUNTERPARTS[name])
    plain.load_state_dict(hf_tam.export_torch_state_dict(twin.optimizer))
    assert not is_ours(type(theirs).__name__)
    for mine, other in zip(theirs.state.values(), plain.state.values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], value) for key, value in other.items())
    step(theirs, 99)


@EVERY_OURS
def test_an_export_keeps_what_is_the_users(name):
    run = Run(name)
    for parameter in run.parameters:
        run.optimizer.state[parameter]["mine"] = torch.ones(2)
    exported = hf_tam.export_torch_state_dict(run.optimizer)
    assert [sorted(state) for state in exported["state"].values()] == [
        ["mine", "momentum_buffer"] if name == "TAM" else ["exp_avg", "exp_avg_sq", "mine", "step"]
    ] * 3
