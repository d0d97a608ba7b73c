"""State that is saved and loaded: ours, torch's, and what must be refused."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import hf_tam
from tests.cases import backends_of
from tests.test_properties import EVERY_BACKEND, fresh_parameters, make
from tests.test_torch_contract import NAMES, assert_bitwise, set_gradients, walk

ADAM_BACKENDS = pytest.mark.parametrize("backend", backends_of("AdaTAMW"))


def through_a_file(state_dict):
    """What a resume reads: no code, no objects but tensors and primitives."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(parameters):
    return [nn.Parameter(parameter.detach().clone()) for parameter in parameters]


@pytest.fixture
def silent():
    """Correct use warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* of bfloat16 parameters did not move")
        yield


# --- ours ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("silent")
def test_resume_is_bit_identical(name, backend, dtype):
    """16-bit parameters too: torque, step and scale stay fp32, with every bit."""
    parameters = fresh_parameters(dtype=dtype)
    options = {"lr": 0.01, "gamma": 0.8} if name == "TAM" else {"lr": 0.01, "gamma": 0.8, "eps": 1e-4}
    optimizer = make(name, parameters, backend, **options)
    walk(optimizer, parameters, range(5))
    saved = through_a_file(optimizer.state_dict())
    resumed_parameters = clones(parameters)
    resumed = make(name, resumed_parameters, backend, **options)
    resumed.load_state_dict(saved)
    assert_bitwise(optimizer, parameters, resumed, resumed_parameters)
    for parameter in resumed_parameters:
        assert resumed.state[parameter]["torque"].dtype == torch.float32
        assert float(resumed.state[parameter]["torque"]) != 0
    walk(optimizer, parameters, range(5, 10))
    walk(resumed, resumed_parameters, range(5, 10))
    assert_bitwise(optimizer, parameters, resumed, resumed_parameters)


@NAMES
@pytest.mark.usefixtures("silent")
def test_large_step_counts_survive_16_bits(name):
    """A cast to bf16 would turn 1000001 into 999424."""
    parameters = fresh_parameters(dtype=torch.bfloat16)
    optimizer = make(name, parameters)
    walk(optimizer, parameters, [0])
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"].fill_(1_000_001)
    optimizer.load_state_dict(through_a_file(saved))
    assert all(float(optimizer.state[parameter]["step"]) == 1_000_001 for parameter in parameters)


@NAMES
@pytest.mark.usefixtures("silent")
def test_before_the_first_step(name):
    parameters = fresh_parameters()
    optimizer = make(name, parameters)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    walk(optimizer, parameters, range(2))
    twins = fresh_parameters()
    twin = make(name, twins)
    walk(twin, twins, range(2))
    assert_bitwise(optimizer, parameters, twin, twins)


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM"])
@pytest.mark.parametrize("first", backends_of("AdaTAMW"))
@ADAM_BACKENDS
@pytest.mark.usefixtures("silent")
def test_the_backend_stays_the_constructors(name, first, backend):
    """A state saved by any backend goes on in any other (tolerance: the backends' own), which keeps its flags."""
    parameters = fresh_parameters()
    saver = make(name, parameters, first)
    walk(saver, parameters, range(5))
    twins = clones(parameters)
    loader = make(name, twins, backend)
    flags = {key: loader.param_groups[0][key] for key in ("foreach", "fused", "capturable")}
    loader.load_state_dict(through_a_file(saver.state_dict()))
    assert {key: loader.param_groups[0][key] for key in flags} == flags
    walk(saver, parameters, range(5, 10))
    walk(loader, twins, range(5, 10))
    for mine, their in zip(parameters, twins, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
@pytest.mark.usefixtures("silent")
def test_complex_and_strided_state(name, backend):
    """Layout and complex dtype come back, and the run goes on bit for bit."""

    def build():
        torch.manual_seed(3)
        return [
            nn.Parameter(torch.randn(3, 4, dtype=torch.complex64)),
            nn.Parameter(torch.randn(5, 4).t()),
            nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(0)),
        ]

    parameters = build()
    optimizer = make(name, parameters, backend)
    walk(optimizer, parameters, range(3))
    twins = build()
    for twin, parameter in zip(twins, parameters, strict=True):
        twin.data.copy_(parameter.data)
    resumed = make(name, twins, backend)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    walk(optimizer, parameters, range(3, 6))
    walk(resumed, twins, range(3, 6))
    assert_bitwise(optimizer, parameters, resumed, twins)


@EVERY_BACKEND
@pytest.mark.usefixtures("silent")
def test_a_state_of_another_memory_layout(name, backend):
    """Saved contiguous, loaded for channels-last and transposed parameters: a raw walk over memory would mix it up."""
    parameters = fresh_parameters(((4, 3, 5, 5), (6, 7)))
    optimizer = make(name, parameters, backend)
    walk(optimizer, parameters, range(3))
    saved = through_a_file(optimizer.state_dict())
    image, matrix = (parameter.detach().clone() for parameter in parameters)
    other = [
        nn.Parameter(image.contiguous(memory_format=torch.channels_last)),
        nn.Parameter(matrix.t().contiguous().t()),
    ]
    resumed = make(name, other, backend)
    resumed.load_state_dict(saved)
    for seed in range(3, 6):
        set_gradients(parameters, seed)
        for twin, parameter in zip(other, parameters, strict=True):
            twin.grad = torch.empty_like(twin).copy_(parameter.grad)
        optimizer.step()
        resumed.step()
    for twin, parameter in zip(other, parameters, strict=True):
        torch.testing.assert_close(twin, parameter, rtol=1e-6, atol=1e-6)


# --- hyperparameters -----------------------------------------------------------------------------------------------

CHANGED = [
    ("weight_decay", 0.1, 0.0),
    ("gamma", 0.9, 0.5),
    ("damping_eps", 1e-8, 0.1),
    ("scope", "tensor", "model"),
    ("step_size", None, "paper"),
    ("torque_steps", None, 7),
    ("nonfinite", "skip", "raise"),
    ("maximize", False, True),
]


@NAMES
@pytest.mark.parametrize(("key", "saved", "requested"), CHANGED, ids=[key for key, _, _ in CHANGED])
def test_a_saved_hyperparameter_that_overrides_warns(name, key, saved, requested):
    """As in torch the saved value wins, but not without a word that names it and both values."""
    if key == "step_size":
        saved = "sgd" if name == "TAM" else "adamw"
    parameters = fresh_parameters()
    optimizer = make(name, parameters, **{key: saved})
    walk(optimizer, parameters, range(2))
    resumed = make(name, clones(parameters), **{key: requested})
    with pytest.warns(UserWarning, match=key) as caught:
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    text = str(caught[0].message)
    assert str(saved) in text
    assert str(requested) in text
    assert resumed.param_groups[0][key] == saved


@pytest.mark.parametrize(("key", "saved", "requested"), [("betas", (0.9, 0.99), (0.8, 0.99)), ("eps", 1e-8, 1e-6)])
def test_a_saved_adam_hyperparameter_that_overrides_warns(key, saved, requested):
    parameters = fresh_parameters()
    optimizer = make("AdaTAMW", parameters, **{key: saved})
    walk(optimizer, parameters, range(2))
    resumed = make("AdaTAMW", clones(parameters), **{key: requested})
    with pytest.warns(UserWarning, match=key):
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert tuple(resumed.param_groups[0][key]) == saved if key == "betas" else resumed.param_groups[0][key] == saved


def _cosine(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def _one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30)


@NAMES
@pytest.mark.parametrize("schedule", [_cosine, _one_cycle])
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
@pytest.mark.usefixtures("silent")
def test_a_plain_resume_is_silent(name, schedule, scheduler_first, tensor_lr):
    """The schedule has moved lr (and betas) away from the constructor's: that is no surprise to anybody."""

    def build(parameters):
        lr = torch.tensor(0.01) if tensor_lr else 0.01
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0, "lr": 0.02}]
        return make(name, groups, lr=lr, weight_decay=0.1)

    parameters = fresh_parameters()
    optimizer = build(parameters)
    scheduler = schedule(optimizer)
    for seed in range(6):
        walk(optimizer, parameters, [seed])
        scheduler.step()
    saved, saved_scheduler = through_a_file(optimizer.state_dict()), scheduler.state_dict()
    twins = clones(parameters)
    resumed = build(twins)
    if scheduler_first:
        resumed_scheduler = schedule(resumed)
        resumed.load_state_dict(saved)
    else:
        resumed.load_state_dict(saved)
        resumed_scheduler = None
    assert float(resumed.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
    if resumed_scheduler is not None:
        resumed_scheduler.load_state_dict(saved_scheduler)
        for seed in range(6, 9):
            for each, its_parameters, its_scheduler in (
                (optimizer, parameters, scheduler),
                (resumed, twins, resumed_scheduler),
            ):
                walk(each, its_parameters, [seed])
                its_scheduler.step()
        assert_bitwise(optimizer, parameters, resumed, twins)


# --- what must be refused ------------------------------------------------------------------------------------------


def _named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, list(model.parameters())


def _other_states():
    return [
        ("AdaTAMW", lambda p: torch.optim.Adagrad(p)),
        ("AdaTAMW", lambda p: torch.optim.RMSprop(p, momentum=0.9)),
        ("AdaTAMW", lambda p: torch.optim.SGD(p, momentum=0.9)),
        ("AdaTAMW", lambda p: torch.optim.Adamax(p)),
        ("AdaTAMW", lambda p: hf_tam.TAM(p)),
        ("AdaTAM", lambda p: torch.optim.SGD(p, momentum=0.9)),
        ("TAM", lambda p: torch.optim.AdamW(p)),
        ("TAM", lambda p: torch.optim.Adagrad(p)),
        ("TAM", lambda p: hf_tam.AdaTAMW(p)),
    ]


@pytest.mark.parametrize(("name", "other"), _other_states())
def test_another_optimizers_state(name, other):
    model, parameters = _named()
    saver = other(clones(parameters))
    walk(saver, saver.param_groups[0]["params"], range(2))
    optimizer = make(name, model.named_parameters())
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict(through_a_file(saver.state_dict()))
    walk(optimizer, parameters, [0])  # it was left usable
    assert all(float(optimizer.state[parameter]["step"]) == 1 for parameter in parameters)


@pytest.mark.parametrize("torch_class", [torch.optim.AdamW, torch.optim.Adam])
def test_amsgrad_is_refused(torch_class):
    parameters = fresh_parameters()
    theirs = torch_class(parameters, amsgrad=True)
    walk(theirs, parameters, range(2))
    ours = make("AdaTAMW", clones(parameters))
    with pytest.raises(ValueError, match="amsgrad"):
        ours.load_state_dict(theirs.state_dict())


@NAMES
@pytest.mark.parametrize("named", [True, False])
def test_wrong_shapes_name_the_parameter(name, named):
    """The second weight is transposed in the checkpoint; nothing is loaded."""
    model, parameters = _named()
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 4))
    with torch.no_grad():
        other[1].bias = nn.Parameter(torch.zeros(2))
    saver = make(name, other.parameters())
    walk(saver, list(other.parameters()), range(2))
    optimizer = make(name, model.named_parameters() if named else model.parameters())
    with pytest.raises(ValueError, match=r"1\.weight" if named else r"\b2\b") as caught:
        optimizer.load_state_dict(through_a_file(saver.state_dict()))
    assert "2, 4" in str(caught.value)
    assert "4, 2" in str(caught.value)
    assert not any(optimizer.state.get(parameter) for parameter in parameters)


@NAMES
def test_wrong_shapes_of_torchs_state(name):
    model, _ = _named()
    twin = {"AdaTAMW": torch.optim.AdamW, "AdaTAM": torch.optim.Adam, "TAM": torch.optim.SGD}[name]
    other = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 4), (2,))]
    saver = twin(other, momentum=0.9) if name == "TAM" else twin(other)
    walk(saver, other, range(2))
    optimizer = make(name, model.named_parameters())
    with pytest.raises(ValueError, match=r"0\.bias"):
        optimizer.load_state_dict(through_a_file(saver.state_dict()))


@NAMES
def test_wrong_group_sizes(name):
    """torch's own words."""
    parameters = fresh_parameters()
    saver = make(name, parameters)
    walk(saver, parameters, [0])
    fewer = make(name, clones(parameters)[:2])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        fewer.load_state_dict(saver.state_dict())
    split = make(name, [{"params": [parameter]} for parameter in clones(parameters)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        split.load_state_dict(saver.state_dict())


@NAMES
@pytest.mark.parametrize("missing", ["torque", "step"])
def test_a_state_of_ours_with_a_missing_scalar(name, missing):
    """`torque` is filled with 0, as for AdamW's state; `step` decides bias correction and cannot be guessed."""
    parameters = fresh_parameters()
    saver = make(name, parameters)
    walk(saver, parameters, range(3))
    saved = through_a_file(saver.state_dict())
    for state in saved["state"].values():
        del state[missing]
    optimizer = make(name, clones(parameters))
    if missing == "step" and name != "TAM":
        with pytest.raises(ValueError, match="step"):
            optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict(saved)
    for parameter in optimizer.param_groups[0]["params"]:
        assert float(optimizer.state[parameter][missing]) == 0


@pytest.mark.parametrize("frozen", [0, 2])
@NAMES
@pytest.mark.usefixtures("silent")
def test_a_parameter_without_state(name, frozen):
    """One that never had a gradient is absent from the checkpoint, and stays fresh."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters)
    set_gradients(parameters, 1)
    parameters[frozen].grad = None
    optimizer.step()
    twins = clones(parameters)
    resumed = make(name, twins)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    walk(optimizer, parameters, range(2, 4))
    walk(resumed, twins, range(2, 4))
    assert_bitwise(optimizer, parameters, resumed, twins)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("saver", "loader"), [("AdaTAM", "AdaTAMW"), ("AdaTAMW", "AdaTAM"), ("TAM", "AdaTAMW")])
def test_one_of_ours_does_not_load_another(saver, loader, steps):
    """Coupled decay must not become decoupled without a word, also before there is any state."""
    parameters = fresh_parameters()
    optimizer = make(saver, parameters)
    walk(optimizer, parameters, range(steps))
    with pytest.raises(ValueError, match="the saved state"):
        make(loader, fresh_parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_pickle_leaves_the_groups_as_they_were(name):
    optimizer = make(name, fresh_parameters())
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
