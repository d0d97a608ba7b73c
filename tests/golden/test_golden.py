"""Checkpoints of an earlier version load, and the run goes on as the one that wrote them did."""

import copy
import json
import shutil

import pytest
import torch

from hf_tam.step import buffers
from tests.golden import runs, zero
from tests.tables import check_rows


def load(name):
    return torch.load(runs.FOLDER / name, weights_only=True)


def assert_close(found, expected, tolerance, where):
    torch.testing.assert_close(found, expected, **tolerance, msg=lambda text: f"{where}: {text}")


def test_files_are_there_with_who_wrote_them():
    assert set(runs.provenance()) == {
        "torch",
        "transformers",
        "accelerate",
        "deepspeed",
        "hf_tam",
        "python",
        "machine",
    }
    files = [path for path in runs.FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < 200_000


def test_an_optimizer_goes_on_from_what_was_saved():
    check_rows(_goes_on, {run: (run,) for run in runs.RUNS})


def _goes_on(run):
    saved = load(f"{run}.pt")
    params, optimizer = runs.start(run)
    for param, value in zip(params, saved["params"], strict=True):
        param.data.copy_(value)
    optimizer.load_state_dict(copy.deepcopy(saved["state_dict"]))
    _assert_same_state(optimizer.state_dict(), saved["state_dict"])
    for number in range(runs.NUM_BEFORE, runs.NUM_BEFORE + runs.NUM_AFTER):
        runs.step(params, optimizer, number)
    for index, (param, value) in enumerate(zip(params, load(f"{run}.after.pt")["params"], strict=True)):
        tolerance = {"rtol": 2**-7, "atol": 0} if param.dtype == torch.bfloat16 else runs.TOLERANCE
        torch.testing.assert_close(
            param.detach(), value, **tolerance, msg=lambda text, at=index: f"tensor {at}: {text}"
        )


def _assert_same_state(found, saved):
    """What an older version has saved is there, bit for bit; a newer one may have more keys in its param groups."""
    assert found["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert found["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(found["state"][index][key], value), f"tensor {index}, {key}"
    for mine, theirs in zip(found["param_groups"], saved["param_groups"], strict=True):
        assert {key: mine[key] for key in theirs} == theirs


def test_what_is_saved_today_has_the_keys_of_then():
    """And no others, later hyperparameters aside: a change of states is a new golden file beside the old one."""
    check_rows(_has_the_keys, {run: (run,) for run in runs.RUNS})


def _has_the_keys(run):
    params, optimizer = runs.start(run)
    for number in range(runs.NUM_BEFORE):
        runs.step(params, optimizer, number)
    today, saved = optimizer.state_dict(), load(f"{run}.pt")["state_dict"]
    since = {"param_correction", "state_bits"}
    assert [set(group) - since for group in today["param_groups"]] == [set(group) for group in saved["param_groups"]]
    assert today["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        kinds = {key: (value.dtype, value.shape) for key, value in state.items()}
        assert {key: (value.dtype, value.shape) for key, value in today["state"][index].items()} == kinds


@pytest.mark.long
def test_a_trainer_goes_on_from_its_folder(tmp_path):
    """Optimizer, schedule, generators and the order of the records."""
    name = f"checkpoint-{runs.NUM_BEFORE}"
    shutil.copytree(runs.FOLDER / "trainer" / name, tmp_path / name)
    trainer = runs.trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / name))
    assert trainer.state.global_step == runs.NUM_BEFORE + runs.NUM_AFTER
    history = json.loads((runs.FOLDER / "trainer" / name / "trainer_state.json").read_text())["log_history"]
    assert trainer.state.log_history[: len(history)] == history
    expected = load("trainer/after.pt")
    found = trainer.model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, runs.TOLERANCE, key)


def test_the_table_of_flat_buffers_is_read():
    """Each logical tensor gets its own numbers back, and what is saved again is the same table."""
    saved = load("zero1.pt")
    group, state = saved["state_dict"]["param_groups"][0], dict(saved["state_dict"]["state"][0])
    table = group[buffers.TABLE]
    assert set(table) == {"step", "exp_avg_scale", "torque"}
    positions = list(range(len(table["torque"])))
    spans = [Position(position) for position in positions]
    defaults = dict.fromkeys(table, 0.0)
    buffers.load_vectors(state, group, spans, defaults=defaults, device=torch.device("cpu"))
    assert {key: state[key].tolist() for key in table} == {key: table[key].tolist() for key in table}
    packed = {"state": {0: dict(state)}, "param_groups": [{key: group[key] for key in group if key != buffers.TABLE}]}
    buffers.save_table(packed, [(state, positions)], count=len(positions), scalar_states=list(table))
    again = packed["param_groups"][0][buffers.TABLE]
    assert {key: again[key].tolist() for key in again} == {key: table[key].tolist() for key in table}
    assert packed["state"][0].keys() == saved["state_dict"]["state"][0].keys()


class Position:
    """As much of a span as a table asks for."""

    def __init__(self, position):
        self.position = position


@pytest.mark.distributed
@pytest.mark.launch
def test_zero_goes_on_from_what_was_saved(worlds):
    pytest.importorskip("deepspeed")
    saved = load("zero1.pt")
    torques, parameters = worlds(1).run(zero.load_and_go_on, saved)[0]
    torch.testing.assert_close(torques, saved["stats"])
    assert parameters.keys() == saved["after"].keys()
    for key, value in saved["after"].items():
        if value is not None:
            torch.testing.assert_close(
                parameters[key], value, **runs.TOLERANCE, msg=lambda text, at=key: f"{at}: {text}"
            )
