"""States of torch.optim are taken over exactly, and given back."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_tam
from tests.cases import backends_of
from tests.reference import real_f64
from tests.running import first_moment
from tests.test_checkpoint import ADAM_BACKENDS, clones, silent, through_a_file  # noqa: F401
from tests.test_properties import fresh_parameters, make
from tests.test_torch_contract import walk

TORCH_BACKENDS = pytest.mark.parametrize(
    "torch_backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["single", "foreach", "fused"]
)


def _torch_adamw(steps=5, **options):
    parameters = fresh_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, **options)
    walk(optimizer, parameters, range(steps))
    return optimizer, parameters


@TORCH_BACKENDS
@ADAM_BACKENDS
@pytest.mark.usefixtures("silent")
def test_adamw_state_loads_exactly(torch_backend, backend):
    """Every moment to the last bit, the torque at 0, our own hyperparameters the constructor's."""
    theirs, parameters = _torch_adamw(**torch_backend)
    mine = clones(parameters)
    ours = make("AdaTAMW", mine, backend, lr=0.01, gamma=0.5, damping_eps=0.25, torque_steps=99)
    flags = {key: ours.param_groups[0][key] for key in ("foreach", "fused", "capturable")}
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for parameter, their in zip(mine, parameters, strict=True):
        state, expected = ours.state[parameter], theirs.state[their]
        assert torch.equal(first_moment(state), real_f64(expected["exp_avg"]))
        assert torch.equal(state["exp_avg_sq"], expected["exp_avg_sq"])
        assert float(state["step"]) == 5
        assert float(state["torque"]) == 0
        assert state["torque"].dtype == torch.float32
    (group,) = ours.param_groups
    assert {key: group[key] for key in flags} == flags
    assert (group["gamma"], group["damping_eps"], group["torque_steps"]) == (0.5, 0.25, 99)
    assert (group["scope"], group["step_size"], group["nonfinite"]) == ("tensor", "adamw", "skip")


@TORCH_BACKENDS
@ADAM_BACKENDS
@pytest.mark.usefixtures("silent")
def test_adamw_goes_on_as_adamw(torch_backend, backend):
    """Held neutral, what was loaded continues torch's run (tolerance: rounding of ten steps)."""
    theirs, parameters = _torch_adamw(**torch_backend)
    mine = clones(parameters)
    ours = make("AdaTAMW", mine, backend, lr=0.01, gamma=1.0, damping_eps=0.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    walk(ours, mine, range(5, 15))
    walk(theirs, parameters, range(5, 15))
    for parameter, their in zip(mine, parameters, strict=True):
        torch.testing.assert_close(parameter, their, rtol=2e-6, atol=1e-6)


@TORCH_BACKENDS
@ADAM_BACKENDS
@pytest.mark.usefixtures("silent")
def test_export_right_after_loading_is_the_same_state(torch_backend, backend):
    """There and back: torch's optimizer cannot tell, and goes on bit for bit."""
    theirs, parameters = _torch_adamw(**torch_backend)
    ours = make("AdaTAMW", clones(parameters), backend, lr=0.01)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    exported = through_a_file(hf_tam.export_torch_state_dict(ours))
    original = theirs.state_dict()
    assert exported["state"].keys() == original["state"].keys()
    for index, state in original["state"].items():
        assert exported["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(exported["state"][index][key], value), key
            assert exported["state"][index][key].dtype == value.dtype, key
    assert exported["param_groups"][0].keys() == original["param_groups"][0].keys()
    back = clones(parameters)
    again = torch.optim.AdamW(back, lr=0.01, **torch_backend)
    again.load_state_dict(exported)
    again.param_groups[0].update(torch_backend)
    for key in ("foreach", "fused"):
        again.param_groups[0][key] = theirs.param_groups[0][key]
    walk(again, back, range(5, 8))
    walk(theirs, parameters, range(5, 8))
    assert all(torch.equal(left, right) for left, right in zip(back, parameters, strict=True))


@ADAM_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("silent")
def test_export_after_our_own_steps(backend, dtype):
    """exp_avg is AdamW's again, in AdamW's dtype, and the optimizer that was exported is left alone."""
    parameters = fresh_parameters(dtype=dtype)
    groups = [{"params": parameters[:1], "lr": 0.02, "betas": (0.8, 0.9)}, {"params": parameters[1:]}]
    ours = make("AdaTAMW", groups, backend, lr=0.01)
    walk(ours, parameters, range(5))
    before = copy.deepcopy(ours.state_dict())
    exported = hf_tam.export_torch_state_dict(ours)
    theirs = torch.optim.AdamW([{"params": clones(parameters[:1])}, {"params": clones(parameters[1:])}])
    theirs.load_state_dict(through_a_file(exported))
    copied = [parameter for group in theirs.param_groups for parameter in group["params"]]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]  # one rounding
    for parameter, their in zip(parameters, copied, strict=True):
        state = theirs.state[their]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        torch.testing.assert_close(
            real_f64(state["exp_avg"]), first_moment(ours.state[parameter]), rtol=tolerance, atol=0
        )
        assert torch.equal(state["exp_avg_sq"], ours.state[parameter]["exp_avg_sq"])
        assert float(state["step"]) == 5
    assert theirs.param_groups[0]["lr"] == 0.02
    assert tuple(theirs.param_groups[0]["betas"]) == (0.8, 0.9)
    walk(theirs, copied, range(5, 7))
    after = ours.state_dict()
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in state.items())


def test_adamw_state_of_old_torch():
    """Before 1.12 `step` was a Python number."""
    theirs, parameters = _torch_adamw()
    saved = theirs.state_dict()
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    mine = clones(parameters)
    ours = make("AdaTAMW", mine, lr=0.01)
    ours.load_state_dict(saved)
    walk(ours, mine, [5])
    assert all(float(ours.state[parameter]["step"]) == 6 for parameter in mine)


def test_adamw_state_in_bf16():
    """torch keeps bf16 moments there; they load exactly, and torque and scale are fp32 all the same."""
    parameters = fresh_parameters(dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(parameters, lr=0.01)
    walk(theirs, parameters, range(4))
    mine = clones(parameters)
    ours = make("AdaTAMW", mine, lr=0.01)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for parameter, their in zip(mine, parameters, strict=True):
        assert torch.equal(first_moment(ours.state[parameter]), real_f64(theirs.state[their]["exp_avg"]))
        assert ours.state[parameter]["torque"].dtype == torch.float32
        assert ours.state[parameter]["exp_avg_scale"].dtype == torch.float32


@pytest.mark.parametrize("torch_foreach", [False, True])
@pytest.mark.parametrize("backend", backends_of("TAM"))
@pytest.mark.usefixtures("silent")
def test_sgd_state_loads_exactly(torch_foreach, backend):
    parameters = fresh_parameters()
    theirs = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=torch_foreach)
    walk(theirs, parameters, range(5))
    mine = clones(parameters)
    ours = make("TAM", mine, backend, lr=0.01, gamma=1.0, damping_eps=0.0)
    flag = ours.param_groups[0]["foreach"]
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["foreach"] == flag
    for parameter, their in zip(mine, parameters, strict=True):
        assert torch.equal(ours.state[parameter]["momentum_buffer"], theirs.state[their]["momentum_buffer"])
        assert float(ours.state[parameter]["torque"]) == 0
    walk(ours, mine, range(5, 10))
    walk(theirs, parameters, range(5, 10))
    for parameter, their in zip(mine, parameters, strict=True):
        torch.testing.assert_close(parameter, their, rtol=2e-6, atol=1e-6)
