"""state_dicts with more, less or other things in their states than an optimizer of ours has put there."""

from __future__ import annotations

import copy
import io
import warnings

import numpy
import pytest
import torch
from torch import nn

import hf_tam
from tests.field.loading import CLASSES, COUNTERPARTS, OURS, Run, is_ours, parameters_in, parameters_of, step

EVERY_CLASS = pytest.mark.parametrize("name", [*OURS, "AdamW", "SGD"])
EVERY_OURS = pytest.mark.parametrize("name", OURS)


@pytest.fixture(autouse=True)
def _silent():
    """Correct use warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- what others put there -----------------------------------------------------------------------------------------

VALUES = {
    "tensor": torch.tensor([1.5, 2.5]),
    "number": 3,
    "none": None,
    "nested": {"history": [torch.tensor(1.0), torch.tensor(2.0)], "count": 2},
    "tuple": (torch.tensor(1.0), 2),
}
OPAQUE = {"text": "frozen since epoch 3", "bytes": b"12", "array": numpy.array([[1.0, 2.0]])}
"""torch's own load makes "<generator object ...>" of a text, and fails at an array (torch 2.13)."""


def assert_equal(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, numpy.ndarray):
        assert isinstance(actual, numpy.ndarray)
        assert (actual == expected).all()
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_equal(mine, theirs)
    else:
        assert type(actual) is type(expected)
        assert actual == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CLASSES for kind in (*VALUES, *OPAQUE) if is_ours(name) or kind in VALUES],
)
def test_a_value_of_the_users_in_every_state_survives(name, kind):
    """What a recipe keeps beside the moments (masks, counters, importance scores) is loaded and saved again."""
    value = {**VALUES, **OPAQUE}[kind]
    run = Run(name)
    for state in run.saved["state"].values():
        state["mine"] = copy.deepcopy(value)
    resumed = run.resumed()
    run.assert_goes_on(resumed)
    again = run.resumed(resumed.state_dict())
    for state in again.state_dict()["state"].values():
        assert_equal(state["mine"], value)


@EVERY_CLASS
def test_floats_of_the_users_are_cast_as_torch_casts_them(name):
    run = Run(name, dtype=torch.bfloat16)
    for state in run.saved["state"].values():
        state["importance"] = torch.tensor([1.0, 2.0])
    assert run.resumed().state_dict()["state"][0]["importance"].dtype == torch.bfloat16


@EVERY_CLASS
def test_a_hooks_own_entry_beside_the_parameters_survives(name):
    """`optimizer.state["..."]` belongs to no parameter."""
    run = Run(name)
    run.optimizer.state["sampler"] = {"epoch": 4}
    resumed = run.resumed(copy.deepcopy(run.optimizer.state_dict()))
    assert resumed.state["sampler"] == {"epoch": 4}
    run.assert_goes_on(resumed)
    assert resumed.state_dict()["state"]["sampler"] == {"epoch": 4}


@EVERY_OURS
def test_what_adamw_does_not_keep_is_named_once(name):
    """A state that is not ours, and holds more than AdamW's, may be another optimizer's."""
    theirs = Run(COUNTERPARTS[name])
    for state in theirs.saved["state"].values():
        state["mine"] = torch.ones(2)
    ours = theirs.fresh(name, weight_decay=theirs.saved["param_groups"][0]["weight_decay"])
    with pytest.warns(UserWarning, match=r"parameter 0 .*holds \['mine'\] besides") as caught:
        ours.load_state_dict(theirs.saved)
    assert len(caught) == 1
    assert all("mine" in state for state in ours.state_dict()["state"].values())


# --- a step in another form ----------------------------------------------------------------------------------------

STEPS = {
    "int": lambda step: int(step),
    "float": lambda step: float(step),
    "one-element": lambda step: step.reshape(1),
    "int64": lambda step: step.long(),
    "float64": lambda step: step.double(),
    "numpy": lambda step: numpy.float32(step.item()),
}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", [*OURS, "AdamW"])
def test_a_step_in_another_form(name, form):
    run = Run(name)
    for state in run.saved["state"].values():
        state["step"] = STEPS[form](state["step"])
    resumed = run.resumed()
    if is_ours(name):
        steps = [resumed.state[parameter]["step"] for parameter in parameters_in(resumed)]
        assert [(step.dtype, step.shape, step.item()) for step in steps] == [(torch.float32, (), 3.0)] * 3
    run.assert_goes_on(resumed)


@EVERY_OURS
def test_every_scalar_state_in_another_form(name):
    """One-element tensors, Python numbers, numpy's: what tools that unify states make of them."""
    for convert in (lambda value: value.reshape(1), lambda value: value.item(), lambda value: value.double().numpy()):
        run = Run(name)
        for state in run.saved["state"].values():
            state.update({key: convert(state[key]) for key in run.optimizer.scalar_states})
        run.assert_goes_on(run.resumed())


@EVERY_OURS
def test_moments_as_arrays(name):
    """A checkpoint that went through numpy (safetensors.numpy, an .npz file)."""
    run = Run(name)
    run.saved["state"] = {
        key: {name: value.numpy().copy() for name, value in state.items()} for key, state in run.saved["state"].items()
    }
    frozen = run.saved["state"][0][run.optimizer.moments[0]]
    frozen.flags.writeable = False
    before = frozen.copy()
    resumed = run.resumed()
    run.assert_goes_on(resumed)
    assert (frozen == before).all()


# --- less than everything ------------------------------------------------------------------------------------------


@EVERY_CLASS
@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_a_parameter_without_a_state_starts_afresh(name, kind):
    run = Run(name)
    if kind == "absent":
        del run.saved["state"][1]
    else:
        run.saved["state"][1] = {}
    resumed = run.resumed()
    resumed.state_dict()
    step(run.optimizer, 99)
    step(resumed, 99)
    same = [torch.equal(mine, theirs) for mine, theirs in zip(parameters_in(resumed), run.parameters, strict=True)]
    assert same == [True, False, True]
    if "step" in resumed.state[parameters_in(resumed)[1]]:
        assert float(resumed.state[parameters_in(resumed)[1]]["step"]) == 1


@EVERY_CLASS
def test_no_states_at_all(name):
    """Hyperparameters alone; a parameter that was in a state before has none after the load."""
    run = Run(name)
    run.saved["state"] = {}
    resumed = run.resumed()
    assert not resumed.state
    run.optimizer.load_state_dict(run.saved)
    run.assert_goes_on(resumed)


@EVERY_CLASS
def test_states_of_parameters_that_are_gone(name):
    """As torch, which keeps what belongs to no parameter."""
    run = Run(name)
    run.saved["state"][77] = run.saved["state"][0]
    run.assert_goes_on(run.resumed())


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
def test_a_state_without_torque_keeps_its_scale(name):
    """The moment is stored divided by the scale: taken for 1, the next step would be another one."""
    run = Run(name, gamma=1.0)
    assert all(float(state["exp_avg_scale"]) != 1.0 for state in run.saved["state"].values())
    for state in run.saved["state"].values():
        del state["torque"]
    run.assert_goes_on(run.resumed(gamma=1.0))


@EVERY_CLASS
def test_states_by_name(name):
    """Keys are only labels: a pre-hook, or torch.distributed.checkpoint, has made names of them."""
    run = Run(name)
    run.saved["state"] = {f"parameter {key}": state for key, state in run.saved["state"].items()}
    run.saved["param_groups"][0]["params"] = [f"parameter {key}" for key in range(3)]
    run.assert_goes_on(run.resumed())


@EVERY_CLASS
def test_a_parameter_that_stands_in_the_groups_twice(name):
    run = Run(name)
    resumed = run.fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will be an error
        run.optimizer.param_groups.append(dict(run.optimizer.param_groups[0]))
    resumed.param_groups.append(dict(resumed.param_groups[0]))
    resumed.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for mine, theirs in zip(resumed.state.values(), run.optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_sgds_moment_is_halved_once_for_a_parameter_that_stands_there_twice():
    run = Run("SGD")
    run.saved["param_groups"].append(dict(run.saved["param_groups"][0]))
    ours = run.fresh("TAM", step_size="paper")
    ours.param_groups.append(dict(ours.param_groups[0]))
    ours.load_state_dict(run.saved)
    for key, parameter in enumerate(ours.param_groups[0]["params"]):
        half = run.saved["state"][key]["momentum_buffer"] / 2
        assert torch.equal(ours.state[parameter]["momentum_buffer"], half)


# --- a counterpart in another form ---------------------------------------------------------------------------------

COUNTERPART_FORMS = {
    "fused AdamW": ("AdaTAMW", lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True)),
    "Adam that decouples": (
        "AdaTAMW",
        lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True),
    ),
    "fused Adam": ("AdaTAM", lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True)),
    "fused SGD": ("TAM", lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)),
}


@pytest.mark.parametrize("form", COUNTERPART_FORMS)
def test_the_counterpart_in_another_form(form):
    """Held neutral, ours goes on as it does."""
    name, make = COUNTERPART_FORMS[form]
    theirs = make(parameters_of())
    for seed in range(3):
        step(theirs, seed)
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in parameters_in(theirs)]
    ours = CLASSES[name](parameters, lr=0.01, gamma=1.0, damping_eps=0.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step(ours, 99)
    step(theirs, 99)
    for mine, their in zip(parameters, parameters_in(theirs), strict=True):
        torch.testing.assert_close(mine, their, rtol=2e-6, atol=1e-6)


# --- whose memory it is --------------------------------------------------------------------------------------------


@EVERY_CLASS
def test_the_callers_state_dict_is_not_changed(name):
    """Neither its keys nor its groups; the moments are shared, as torch shares them, the scalar states are not."""
    run = Run(name)
    before = copy.deepcopy(run.saved)
    resumed = run.resumed()
    assert run.saved["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert run.saved["state"][key].keys() == state.keys()
        assert all(torch.equal(run.saved["state"][key][name], value) for name, value in state.items())
    moments = {"momentum_buffer"} if name in ("TAM", "SGD") else {"exp_avg", "exp_avg_sq"}
    for key, parameter in enumerate(parameters_in(resumed)):
        saved = run.saved["state"][key]
        shared = {name for name, value in resumed.state[parameter].items() if value is saved[name]}
        assert shared - {"step"} == moments
        assert not is_ours(name) or "step" not in shared


@EVERY_CLASS
def test_loading_its_own_state_dict(name):
    """Nothing changes, however often."""
    run, twin = Run(name), Run(name)
    for _ in range(2):
        run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.assert_goes_on(twin.optimizer)


@EVERY_CLASS
@pytest.mark.parametrize("mmap", [False, True])
def test_through_a_file(name, mmap, tmp_path):
    run = Run(name)
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=mmap)
    run.assert_goes_on(run.resumed(saved))


@EVERY_CLASS
@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "meta", "float64"])
def test_loading_in_a_mode_that_others_set(name, mode):
    """A load inside an evaluation, under `torch.device("meta")` or another default dtype."""
    run = Run(name)
    resumed = run.fresh()
    if mode == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        context = {"inference_mode": torch.inference_mode(), "no_grad": torch.no_grad(), "meta": torch.device("meta")}
        if mode in context:
            with context[mode]:
                resumed.load_state_dict(run.saved)
                resumed.state_dict()
        else:
            resumed.load_state_dict(run.saved)
    finally:
        torch.set_default_dtype(torch.float32)
    run.assert_goes_on(resumed)
    assert not any(value.is_inference() for state in resumed.state.values() for value in state.values())


@EVERY_CLASS
def test_states_and_parameters_on_another_device(name):
    """The meta device stands for an accelerator: states follow the parameters, and nothing is read on the host."""
    run = Run(name)
    abstract = CLASSES[name]([nn.Parameter(parameter.to("meta")) for parameter in run.parameters], lr=0.01)
    abstract.load_state_dict(run.saved)
    again = CLASSES[name]([nn.Parameter(parameter.to("meta")) for parameter in run.parameters], lr=0.01)
    again.load_state_dict(abstract.state_dict())
    for parameter in parameters_in(again):
        devices = {key: value.device.type for key, value in again.state[parameter].items()}
        if not is_ours(name):  # torch's AdamW leaves its step where it was, unless it is fused or capturable
            devices.pop("step", None)
        assert set(devices.values()) == {"meta"}


@EVERY_CLASS
def test_fake_tensors(name):
    """Memory trackers run a whole training step, and a resume, without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    run = Run(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            **run.saved,
            "state": {
                key: {name: mode.from_tensor(value) for name, value in state.items()}
                for key, state in run.saved["state"].items()
            },
        }
        optimizer = CLASSES[name]([nn.Parameter(torch.empty(p.shape)) for p in run.parameters], lr=0.01)
        optimizer.load_state_dict(fake)
        assert len(optimizer.state_dict()["state"]) == 3


@EVERY_OURS
def test_moments_that_require_grad(name):
    """What a meta-learner differentiates through, or a state that was wrapped in parameters."""
    run = Run(name)
    for state in run.saved["state"].values():
        state.update({key: nn.Parameter(value) for key, value in state.items()})
    resumed = run.resumed()
    scalars = [resumed.state[parameter][key] for parameter in parameters_in(resumed) for key in resumed.scalar_states]
    assert not any(scalar.requires_grad for scalar in scalars)
    step(resumed, 99)


@EVERY_CLASS
def test_moments_that_are_negated_when_they_are_read(name):
    """A view of a conjugate; whoever reads its memory sees the other sign."""
    first, second = Run(name), Run(name)
    moment = "momentum_buffer" if name in ("TAM", "SGD") else "exp_avg"
    for state in first.saved["state"].values():
        state[moment] = torch.complex(torch.zeros_like(state[moment]), state[moment]).conj().imag
        assert state[moment].is_neg()
    for state in second.saved["state"].values():
        state[moment] = -state[moment]
    resumed, expected = first.resumed(), second.resumed()
    step(resumed, 99)
    step(expected, 99)
    assert all(map(torch.equal, parameters_in(resumed), parameters_in(expected)))


@EVERY_OURS
def test_torch_load_needs_no_code(name):
    """What is saved, with a counterpart's leftovers in it, is tensors and primitives only."""
    theirs = Run(COUNTERPARTS[name])
    ours = theirs.fresh(name, weight_decay=theirs.saved["param_groups"][0]["weight_decay"])
    group = theirs.saved["param_groups"][0]
    group.update({"lr": numpy.float64(0.01), "weight_decay": numpy.float64(group["weight_decay"])})
    ours.load_state_dict(theirs.saved)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["param_groups"][0]["lr"] == 0.01


@pytest.mark.parametrize("copied", [False, True])
def test_going_back_to_a_snapshot_twice(copied):
    """torch.optim takes the moments of a state_dict over, so that the second way back leads nowhere."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_tam.AdaTAMW([parameter], lr=0.1)

    def steps(count):
        for seed in range(count):
            parameter.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    steps(2)
    snapshot = copy.deepcopy(optimizer.state_dict())
    for turn in range(3):
        optimizer.load_state_dict(optimizer.state_dict())  # says nothing
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.load_state_dict(copy.deepcopy(snapshot) if copied else snapshot)
        assert ["it is no way back" in str(warning.message) for warning in caught] == [True] * (
            turn > 0 and not copied
        )
        steps(3)
