"""DeepSpeed's checkpoints: every param group is resumed with its own hyperparameters, every tensor with its torque."""

import pytest
import torch

from tests.field import universal_runs as runs
from tests.field.deepspeed_alone import deepspeed_alone
from tests.sharding.trained import Model, batches_of_steps, make_optimizer
from tests.sharding.zero_engine import with_engine

pytest.importorskip("deepspeed")
# The steps of these runs move lr by hand, without a scheduler that would note where it began.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint's hyperparameters override the requested ones. lr=")


@pytest.mark.distributed
def test_the_trainers_groups_under_zero3(worlds, tmp_path):
    """Decay in one group, none in the other; the end is that of the run that was not stopped."""
    whole = worlds(2).run(runs.train, str(tmp_path), "zero3")
    resumed = worlds(2).run(runs.resume, str(tmp_path), "zero3")
    for expected, actual in zip(whole, resumed, strict=True):
        assert actual["kind"] == "flat"
        assert expected["decay"] == actual["decay"] == [runs.DECAY, 0.0]
        for name, values in expected["parameters"].items():
            torch.testing.assert_close(torch.tensor(actual["parameters"][name]), torch.tensor(values), msg=name)


@pytest.fixture
def alone():
    with deepspeed_alone():
        yield


def start(stage, *, optimizer=None, num_groups=2, universal=False, options=None, **config):
    model = Model(False)
    if optimizer is None:
        optimizer = make_optimizer("AdaTAMW", model, {"weight_decay": 0.5, **(options or {})}, num_groups=num_groups)
    else:
        optimizer = optimizer(model)
    return with_engine(model, optimizer, stage, load_universal=universal, **config)


def train(trained, steps):
    for step in steps:
        trained.step(batches_of_steps()[step].to(trained.dtype), step, use=0)


def save(trained, folder):
    """After four steps, converted too; and what the run ends with after four more."""
    train(trained, range(4))
    trained.engine.save_checkpoint(folder, tag="step")
    runs.convert(str(folder), "step")
    train(trained, range(4, 8))
    return trained.whole_parameters(), trained.optimizer.torque_stats()["torque"]


STAGES = {
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero3-subgroups": (3, {"sub_group_size": 20}),
    "bf16-optimizer": (1, {"dtype": torch.bfloat16, "grad_accum_dtype": "fp32"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_a_universal_checkpoint_goes_on_as_the_run_that_made_it(alone, tmp_path, name):
    stage, config = STAGES[name]
    parameters, torque = save(start(stage, **config), tmp_path)
    # what the resuming script asks for is overridden, except how the step is executed
    resumed = start(stage, universal=True, options={"gamma": 0.5, "foreach": True}, **config)
    with pytest.warns(UserWarning, match=r"override the requested ones: .*gamma=0.9 \(requested: 0.5\)"):
        resumed.engine.load_checkpoint(tmp_path, tag="universal")
    decays = [group["weight_decay"] for group in resumed.optimizer.param_groups]
    assert decays == [0.5, 0.01]
    assert [group["gamma"] for group in resumed.optimizer.param_groups] == [0.9, 0.9]
    assert [group["foreach"] for group in resumed.optimizer.param_groups] == [True, True]
    train(resumed, range(4, 8))
    torch.testing.assert_close(resumed.optimizer.torque_stats()["torque"], torque, rtol=0, atol=1e-6)
    for key, value in resumed.whole_parameters().items():
        torch.testing.assert_close(value, parameters[key], msg=key)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_param_groups_than_the_checkpoints_are_refused(alone, tmp_path, stage):
    save(start(stage, num_groups=1), tmp_path)
    resumed = start(stage, universal=True)
    before = resumed.whole_parameters()
    with pytest.raises(ValueError, match=r"was saved with 1 param group\(s\), and the optimizer has 2 here"):
        resumed.engine.load_checkpoint(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in resumed.whole_parameters().items())


def adamw(model):
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.01}]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.5)


@pytest.mark.long
@pytest.mark.parametrize("again", [False, True], ids=["", "saved again before a step"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_of_adamw_is_taken_over(alone, tmp_path, stage, again):
    """Its own keys are left behind, and its moments are ours with the torque at 0."""
    trained = start(stage, optimizer=adamw)
    train(trained, range(4))
    moments = [trained.optimizer.state[buffer]["exp_avg"].clone() for buffer in trained.stepped()]
    trained.engine.save_checkpoint(tmp_path, tag="step")
    runs.convert(str(tmp_path), "step")
    resumed = start(stage, universal=True)
    resumed.engine.load_checkpoint(tmp_path)
    if again:
        resumed.engine.save_checkpoint(tmp_path / "again", tag="step")
        resumed = start(stage)
        resumed.engine.load_checkpoint(tmp_path / "again", tag="step")
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.5, 0.01]
    assert not any({"amsgrad", "differentiable"} & set(group) for group in resumed.optimizer.param_groups)
    for buffer, moment in zip(resumed.stepped(), moments, strict=True):
        assert torch.equal(resumed.optimizer.state[buffer]["exp_avg"], moment)
    train(resumed, [4])
    states = [resumed.optimizer.state[buffer] for buffer in resumed.stepped()]
    assert {float(step) for state in states for step in state["step"]} == {5.0}
    assert min(float(state["exp_avg_scale"].min()) for state in states) > 0.9  # AdamW's moment has the scale 1


def test_a_universal_checkpoint_of_adam_is_not_adamws(alone, tmp_path):
    trained = start(2, optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.02))
    train(trained, range(2))
    trained.engine.save_checkpoint(tmp_path, tag="step")
    runs.convert(str(tmp_path), "step")
    with pytest.raises(ValueError, match="coupled weight decay, as Adam does"):
        start(2, universal=True, num_groups=1).engine.load_checkpoint(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("arguments", [{"load_optimizer_states": False}, {"load_module_only": True}])
def test_the_weights_alone(alone, tmp_path, arguments):
    """The resuming run's groups stay its own."""
    save(start(3), tmp_path)
    resumed = start(3, universal=True, options={"gamma": 0.5})
    resumed.engine.load_checkpoint(tmp_path, **arguments)
    assert [group["gamma"] for group in resumed.optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.long
@pytest.mark.parametrize("universal", [False, True], ids=["as saved", "universal"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saved_again_before_a_step_it_is_the_same(alone, tmp_path, stage, universal):
    """Loaded and saved at once, as by a script that only converts, or resumes at its last step."""
    save(start(stage), tmp_path)
    loaded = start(stage, universal=universal)
    loaded.engine.load_checkpoint(tmp_path, tag="universal" if universal else "step")
    torque = loaded.optimizer.torque_stats()["torque"]
    assert torque.abs().max() > 0.01
    loaded.engine.save_checkpoint(tmp_path / "again", tag="step")
    again = start(stage)
    again.engine.load_checkpoint(tmp_path / "again", tag="step")
    assert torch.equal(again.optimizer.torque_stats()["torque"], torque)
    train(again, [4])
    assert {float(step) for buffer in again.stepped() for step in again.optimizer.state[buffer]["step"]} == {5.0}
