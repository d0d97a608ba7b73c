"""DeepSpeed ZeRO's flat buffers, whose scalar states stand in a table: what is the user's survives there as well."""

import copy

import pytest
import torch

import hf_tam
from tests.sharding import zero_engine
from tests.sharding.trained import Model, batches_of_steps

pytestmark = pytest.mark.distributed


def engine(stage):
    return zero_engine.starting(stage)(Model(False), "AdaTAMW", {}, 1)


def save_and_load(stage):
    """Steps, saves with things of the user's, loads that and steps again; what came back of them, and an export."""
    trained = engine(stage)
    optimizer, batches = trained.optimizer, batches_of_steps()
    for step in range(3):
        trained.step(batches[step], step, use=step)
    (buffer,) = optimizer.param_groups[0]["params"]
    optimizer.state["sampler"] = {"epoch": 4}
    optimizer.state[buffer]["mine"] = torch.arange(2.0)
    saved = copy.deepcopy(optimizer.state_dict())
    torques = optimizer.torque_stats()["torque"]
    optimizer.load_state_dict(saved)
    loaded = optimizer.state_dict()
    kept = loaded["state"]["sampler"], loaded["state"][0]["mine"].tolist()
    trained.step(batches[3], 3, use=3)
    return kept, torques.any().item(), optimizer.torque_stats()["torque"].isfinite().all().item(), refused(optimizer)


def refused(optimizer):
    try:
        return hf_tam.export_torch_state_dict(optimizer)
    except RuntimeError as error:
        return str(error)


def export_of(stage):
    trained = engine(stage)
    trained.step(batches_of_steps()[0], 0, use=0)
    return refused(trained.optimizer)


def test_what_is_the_users_survives(worlds):
    for kept, moved, finite, said in worlds(2).run(save_and_load, 1):
        assert kept == ({"epoch": 4}, [0.0, 1.0])
        assert moved
        assert finite
        assert "DeepSpeed ZeRO" in said


def test_an_export_says_that_there_is_none(worlds):
    """It was a KeyError, or flat buffers that no optimizer of torch's has parameters for."""
    for said in worlds(2).run(export_of, 3):
        assert "torch.optim has no form" in said
