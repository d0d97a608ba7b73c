"""DeepSpeed's checkpoints: what is resumed in new processes is, bit for bit, what was saved."""

import os
import subprocess
import sys

import pytest
import torch

from tests.sharding import strategies, zero_engine
from tests.sharding.processes import World
from tests.sharding.trained import Model, batches_of_steps

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

SAVED_AFTER = 12
STEPS_AFTER = 4
SAME_TOPOLOGY = ["zero1-fp32-sums-bf16-2", "zero2-groups-2", "zero3-subgroups-2"]
MORE = ["zero1-2", "zero2-2", "zero3-2", "zero2-bf16-2", "zero3-groups-2", "zero2-offload-2"]
SAME_TOPOLOGY += [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.fixture(scope="module")
def fresh_worlds(tmp_path_factory):
    """Processes that have seen nothing of what was saved."""
    started = {size: World(size, str(tmp_path_factory.mktemp(f"fresh{size}"))) for size in (2, 4)}
    yield started
    for world in started.values():
        world.close()


def start(name, optimizer_name="AdaTAMW", **config):
    sharding = strategies.SHARDINGS[name]
    return sharding.start(Model(False), optimizer_name, {"weight_decay": 0.1}, sharding.num_groups, **config)


def train(trained, steps):
    for step in steps:
        trained.step(batches_of_steps()[step], step, use=0)


def everything(trained, *, whole=False):
    """Parameters and every state of every logical tensor by name; moments whole, or as this rank holds them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = trained.optimizer
    if whole:
        moments = {
            f"{name} {key}": safe_get_full_optimizer_state(parameter, key)
            for name, parameter in trained.module.named_parameters()
            for key in optimizer.moments
        }
    else:
        moments = {
            f"buffer {number} {key}": optimizer.state[buffer][key]
            for number, buffer in enumerate(trained.stepped())
            for key in optimizer.moments
        }
    scalars = {key: torch.full((len(optimizer._names()),), torch.nan) for key in optimizer.scalar_states}
    for buffer, positions in optimizer.logical.buffers(optimizer.state):
        for key in optimizer.scalar_states:
            scalars[key][positions] = optimizer.state[buffer][key]
    return {key: value.clone() for key, value in {**trained.whole_parameters(), **moments, **scalars}.items()}


def save_and_go_on(name, folder, optimizer_name="AdaTAMW", whole=False):
    trained = start(name, optimizer_name)
    train(trained, range(SAVED_AFTER))
    assert trained.optimizer.torque_stats()["torque"].abs().max() > 0.05
    trained.engine.save_checkpoint(folder, tag="step")
    at_save = everything(trained, whole=whole)
    train(trained, range(SAVED_AFTER, SAVED_AFTER + STEPS_AFTER))
    return at_save, everything(trained, whole=whole)


def resume_and_go_on(name, folder, tag="step", optimizer_name="AdaTAMW", config=None):
    trained = start(name, optimizer_name, **(config or {}))
    trained.engine.load_checkpoint(folder, tag=tag)
    loaded_torque = trained.optimizer.torque_stats()["torque"]
    train(trained, range(SAVED_AFTER, SAVED_AFTER + STEPS_AFTER))
    return loaded_torque, everything(trained, whole=config is not None)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    different = [
        key for key in expected if not torch.equal(actual[key].nan_to_num(9.0), expected[key].nan_to_num(9.0))
    ]
    assert different == []


@pytest.mark.parametrize("name", SAME_TOPOLOGY)
def test_same_topology_goes_on_bit_for_bit(worlds, fresh_worlds, tmp_path, name):
    saved = worlds(2).run(save_and_go_on, name, str(tmp_path))
    resumed = fresh_worlds[2].run(resume_and_go_on, name, str(tmp_path))
    for (at_save, final), (loaded_torque, resumed_final) in zip(saved, resumed, strict=True):
        assert torch.equal(loaded_torque, at_save["torque"].nan_to_num(0.0))
        assert_equal(resumed_final, final)


@pytest.mark.parametrize("optimizer_name", ["AdaTAM", "TAM"])
def test_the_other_optimizers(worlds, fresh_worlds, tmp_path, optimizer_name):
    saved = worlds(2).run(save_and_go_on, "zero2-2", str(tmp_path), optimizer_name)
    resumed = fresh_worlds[2].run(resume_and_go_on, "zero2-2", str(tmp_path), "step", optimizer_name)
    for (_, final), (_, resumed_final) in zip(saved, resumed, strict=True):
        assert_equal(resumed_final, final)


def convert(folder):
    """As DeepSpeed's own converter is called by its users."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
               "--input_folder", str(folder / "step"), "--output_folder", str(folder / "universal")]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("stage", "saved_by", "resumed_by"),
    [
        pytest.param(1, 2, 4, marks=pytest.mark.slow),
        (2, 4, 2),
        pytest.param(3, 2, 4, marks=pytest.mark.slow),
        pytest.param(3, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_universal_checkpoint_with_another_number_of_ranks(
    worlds, fresh_worlds, tmp_path, stage, saved_by, resumed_by
):
    saved = worlds(saved_by).run(save_and_go_on, f"zero{stage}-{saved_by}", str(tmp_path), "AdaTAMW", True)
    convert(tmp_path)
    config = {"load_universal": True}
    resumed = fresh_worlds[resumed_by].run(
        resume_and_go_on, f"zero{stage}-{resumed_by}", str(tmp_path), "universal", "AdaTAMW", config
    )
    at_save, final = saved[0]
    for loaded_torque, resumed_final in resumed:
        assert torch.equal(loaded_torque, at_save["torque"].nan_to_num(0.0))
        for key, value in final.items():
            # the same state, stepped with sums of gradients in another order
            torch.testing.assert_close(resumed_final[key], value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=key)


def save_adamw(name, folder):
    """A run of torch's own AdamW; its state as this rank holds it."""
    model = Model(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    trained = zero_engine.with_engine(model, optimizer, int(name[4]))
    train(trained, range(SAVED_AFTER))
    trained.engine.save_checkpoint(folder, tag="step")
    return [optimizer.state[buffer]["exp_avg"].clone() for buffer in trained.stepped()]


def load_adamw(name, folder):
    trained = start(name)
    trained.engine.load_checkpoint(folder, tag="step")
    moments = [trained.optimizer.state[buffer]["exp_avg"].clone() for buffer in trained.stepped()]
    torque = trained.optimizer.torque_stats()["torque"]
    train(trained, [SAVED_AFTER])
    states = [trained.optimizer.state[buffer] for buffer in trained.stepped()]
    steps = {step for state in states for step in state["step"].tolist()}
    return moments, torque, steps, float(states[0]["exp_avg_scale"].min())


@pytest.mark.parametrize("name", ["zero1-2", "zero2-2", "zero3-2"])
def test_a_checkpoint_of_adamw_is_taken_over(worlds, fresh_worlds, tmp_path, name):
    saved = worlds(2).run(save_adamw, name, str(tmp_path))
    loaded = fresh_worlds[2].run(load_adamw, name, str(tmp_path))
    for expected, (moments, torque, steps, scale) in zip(saved, loaded, strict=True):
        assert all(torch.equal(moment, saved_moment) for moment, saved_moment in zip(moments, expected, strict=True))
        assert not torque.any()
        assert steps == {SAVED_AFTER + 1.0}
        assert scale > 0.9  # AdamW's moment has the scale 1: one step with another angle takes little from it


def resume_message(name, folder):
    try:
        resume_and_go_on(name, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("stage", [1, 3])
def test_another_number_of_ranks_without_conversion_is_an_error(worlds, fresh_worlds, tmp_path, stage):
    """DeepSpeed's own, before anything is trained; ranks without a file only fail. The frameworks' is ours."""
    worlds(2).run(save_and_go_on, f"zero{stage}-2", str(tmp_path))
    messages = fresh_worlds[4].run(resume_message, f"zero{stage}-4", str(tmp_path))
    assert "no error" not in messages
    assert any("DP world size of 2 but the current world size is 4" in message for message in messages)


def resume_with_a_frozen_tensor(name, folder):
    sharding = strategies.SHARDINGS[name]
    model = Model(False)
    model.register_parameter("one_more", torch.nn.Parameter(torch.ones(2)))
    trained = sharding.start(model, "AdaTAMW", {}, 1)
    table = {key: torch.zeros(3) for key in trained.optimizer.scalar_states}
    trained.optimizer.param_groups[0]["logical_tensors"] = table
    for buffer in trained.stepped():
        trained.optimizer.state[buffer] = {"step": torch.tensor(3.0)}
        trained.optimizer.state[buffer] |= {key: torch.zeros_like(buffer) for key in trained.optimizer.moments}
    try:
        train(trained, [0])
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_table_of_other_tensors_is_an_error(worlds):
    for message in worlds(2).run(resume_with_a_frozen_tensor, "zero2-2", ""):
        assert "is of 3 parameter tensors, and at least 12 are trained here" in message


def nan_on_one_rank(name):
    trained = start(name)
    train(trained, range(2))
    before = everything(trained)
    batch = batches_of_steps()[2]
    if torch.distributed.get_rank() == 1:
        batch = batch.clone()
        batch[0, 0, 0] = float("nan")
    trained.step(batch, 2, use=0)
    after = everything(trained)
    train(trained, [3])
    return before, after, everything(trained)


@pytest.mark.parametrize("name", ["zero2-2", "zero3-2"])
def test_a_nan_on_one_rank_changes_nothing_on_any(worlds, name):
    for before, after, later in worlds(2).run(nan_on_one_rank, name):
        assert_equal(after, before)
        assert all(bool(value.nan_to_num(0.0).isfinite().all()) for value in later.values())
        assert not torch.equal(later["up.weight"], before["up.weight"])
