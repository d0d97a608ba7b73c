"""torch.distributed.checkpoint with a tensor that never had a gradient, or was frozen when the checkpoint was made.

torch.optim.AdamW stands beside ours. Its own checkpoints then lack a state that whoever resumes asks for, in any
strategy; ours lack it only where tensors are whole, and what torch offers for that case loads ours exactly.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from tests.sharding import checkpoints

pytestmark = pytest.mark.distributed

FULL = {"full_state_dict": True, "cpu_offload": True}


def assert_strategy(model, name):
    assert isinstance(model.never, DTensor) == (name == "fsdp2")


def save(folder, name, optimizer_name, flatten, frozen):
    """Train, and write both of torch's formats; rank 0 writes what is to be resumed, too."""
    model, optimizer = checkpoints.build(name, optimizer_name)
    assert_strategy(model, name)
    model.never.requires_grad_(not frozen)
    checkpoints.train(model, optimizer, 0, checkpoints.SAVED_AT)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    sharded = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(sharded, checkpoint_id=os.path.join(folder, "dcp"))
    options = StateDictOptions(**FULL)
    whole = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if dist.get_rank() == 0:
        torch.save(whole, os.path.join(folder, "full"))
    checkpoints.write_expected(folder, checkpoints.snapshot(model, optimizer))


def load_dcp(folder, model, optimizer, *, partial, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load(state, checkpoint_id=os.path.join(folder, "dcp"), planner=planner)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def load_full(folder, model, optimizer, *, strict, broadcast):
    state = torch.load(os.path.join(folder, "full"), weights_only=True)
    if broadcast and dist.get_rank() > 0:
        state = {"model": {}, "optimizer": {}}
    options = StateDictOptions(**FULL, strict=strict, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def resume(folder, name, optimizer_name, way, options):
    """What differs from the saved run right after the load, or what the load said; then two steps are taken."""
    model, optimizer = checkpoints.build(name, optimizer_name, moved=True)
    assert_strategy(model, name)
    try:
        {"dcp": load_dcp, "full": load_full}[way](folder, model, optimizer, **options)
    except (Exception, CheckpointException) as error:
        return str(error)
    different = checkpoints.differences(checkpoints.snapshot(model, optimizer), checkpoints.read_expected(folder))
    checkpoints.train(model, optimizer, checkpoints.SAVED_AT, checkpoints.SAVED_AT + 2)
    return different


@pytest.fixture(scope="module")
def saved_run(worlds, tmp_path_factory):
    """The folder of a run that was saved, made when it is first asked for."""
    folders = {}

    def run(name, optimizer_name, *, flatten=False, frozen=False):
        key = name, optimizer_name, flatten, frozen
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp("saved"))
            worlds(2 if name == "fsdp2" else 1).run(save, folders[key], name, optimizer_name, flatten, frozen)
        return folders[key]

    return run


REMEDIES = {
    "partial": ("dcp", {"partial": True, "flatten": False}),
    "partial, flattened": ("dcp", {"partial": True, "flatten": True}),
    "not strict": ("full", {"strict": False, "broadcast": False}),
    "not strict, broadcast": ("full", {"strict": False, "broadcast": True}),
}


@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("optimizer_name", ["AdaTAMW", "TAM", "AdamW"])
def test_a_whole_run_goes_on_under_fsdp2(worlds, saved_run, optimizer_name, remedy):
    """AdamW's tensor comes out with one step that nobody took (torch 2.13, _init_optim_state); ours as it was."""
    way, options = REMEDIES[remedy]
    folder = saved_run("single", optimizer_name, flatten=options.get("flatten", False))
    for different in worlds(2).run(resume, folder, "fsdp2", optimizer_name, way, options):
        if optimizer_name == "AdamW":
            assert "never.step" in different
            assert all(name.startswith("never.") for name in different)
        else:
            assert different == []


@pytest.mark.parametrize("optimizer_name", ["AdaTAMW", "AdamW"])
def test_a_whole_run_is_refused_under_fsdp2_where_everything_is_asked_for(worlds, saved_run, optimizer_name):
    """torch names the tensor, on every rank alike, and the way out."""
    folder = saved_run("single", optimizer_name)
    words = "Missing key in checkpoint state_dict: optimizer.state.never."
    for said in worlds(2).run(resume, folder, "fsdp2", optimizer_name, "dcp", {"partial": False, "flatten": False}):
        assert words in said
    for said in worlds(2).run(resume, folder, "fsdp2", optimizer_name, "full", {"strict": True, "broadcast": False}):
        assert "'never'" in said
        assert "strict=False" in said


STRICT = {
    "dcp": ("dcp", {"partial": False, "flatten": False}),
    "flattened": ("dcp", {"partial": False, "flatten": True}),
    "full": ("full", {"strict": True, "broadcast": False}),
    "full, broadcast": ("full", {"strict": True, "broadcast": True}),
}


@pytest.mark.parametrize("target", ["fsdp2", "single"])
@pytest.mark.parametrize("asked", STRICT)
def test_a_sharded_run_goes_on_anywhere(worlds, saved_run, asked, target):
    """Where AdamW's own checkpoint cannot be resumed, ours is complete."""
    way, options = STRICT[asked]
    folder = saved_run("fsdp2", "AdaTAMW", flatten=options.get("flatten", False))
    size = 2 if target == "fsdp2" else 1
    assert worlds(size).run(resume, folder, target, "AdaTAMW", way, options) == [[]] * size


def test_adamws_sharded_run_does_not(worlds, saved_run):
    folder = saved_run("fsdp2", "AdamW")
    for said in worlds(2).run(resume, folder, "fsdp2", "AdamW", "dcp", {"partial": False, "flatten": False}):
        assert "Missing key in checkpoint state_dict: optimizer.state.never." in said


@pytest.mark.parametrize("source", ["single", "fsdp2"])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_tensor_that_was_frozen_and_is_trained_now(worlds, saved_run, source, remedy):
    way, options = REMEDIES[remedy]
    folder = saved_run(source, "AdaTAMW", flatten=options.get("flatten", False), frozen=True)
    assert worlds(2).run(resume, folder, "fsdp2", "AdaTAMW", way, options) == [[], []]
