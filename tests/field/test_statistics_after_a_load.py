"""What torque_stats() says between a load and the next step, where a rank holds nothing of some tensors."""

import math

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.field.loading import Run, step
from tests.sharding import checkpoints


def resumed_statistics(folder, format):
    """The saved torques by name, and what a resumed rank says of them right after the load and after a step."""
    model, optimizer = checkpoints.build("fsdp1", "AdaTAMW")
    checkpoints.train(model, optimizer, 0, checkpoints.SAVED_AT)
    checkpoints.save(folder, model, optimizer, format)
    saved = optimizer.torque_stats()
    model, optimizer = checkpoints.build("fsdp1", "AdaTAMW", moved=True)
    assert isinstance(model, FullyShardedDataParallel)
    before = optimizer.torque_stats()["torque"].tolist()
    checkpoints.load(folder, model, optimizer, format)
    loaded = optimizer.torque_stats()
    held = [parameter.numel() > 0 for group in optimizer.param_groups for parameter in group["params"]]
    checkpoints.train(model, optimizer, checkpoints.SAVED_AT, checkpoints.SAVED_AT + 1)
    stepped = optimizer.torque_stats()
    return {
        "saved": saved["torque"].tolist(),
        "before": before,
        "loaded": loaded["torque"].tolist(),
        "damping": loaded["damping"].tolist(),
        "held": held,
        "stepped": stepped["torque"].tolist(),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("format", ["fsdp1-full", "dcp", "ranks"])
def test_what_other_ranks_hold_is_unknown_and_not_zero(worlds, tmp_path, format):
    results = worlds(4).run(resumed_statistics, str(tmp_path), format)
    assert any(not all(result["held"]) for result in results), "some rank must hold nothing of some tensor"
    for result in results:
        assert set(result["before"]) == {0.0}
        for saved, loaded, damping, held in zip(
            result["saved"], result["loaded"], result["damping"], result["held"], strict=True
        ):
            if math.isnan(loaded):
                assert not held
                assert math.isnan(damping)
            else:
                assert loaded == saved
                assert damping == pytest.approx((1 + saved) / 2)
        # A rank's own file has what it counted along for the others' tensors, torch's formats what it holds.
        unknown = sum(map(math.isnan, result["loaded"]))
        assert unknown == (0 if format == "ranks" else result["held"].count(False))
        assert not any(map(math.isnan, result["stepped"]))
    assert all(result["stepped"] == results[0]["stepped"] for result in results)


@pytest.mark.parametrize("name", ["AdaTAMW", "TAM"])
def test_the_step_before_a_load_was_another_runs(name):
    """Its angles do not stand beside the loaded torques; what was skipped in this process still counts."""
    run = Run(name)
    resumed = run.fresh()
    step(resumed, 7)
    step(resumed, 8)
    assert resumed.torque_stats()["cosine"].any()
    resumed.load_state_dict(run.saved)
    statistics, saved = resumed.torque_stats(), run.optimizer.torque_stats()
    assert statistics["torque"].equal(saved["torque"])
    torch.testing.assert_close(statistics["damping"], (1 + saved["torque"]) / 2)
    assert not statistics["cosine"].any()
    assert all(statistics[key].isnan().all() for key in ("effective_lr", "grad_norms", "grad_norm"))
