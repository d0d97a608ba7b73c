"""Bad input, and parameters an angle cannot be taken of: one clear error, or a slower correct path."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import hf_tam
from tests.cases import backends_of
from tests.test_properties import EVERY_BACKEND, SCOPES, fresh_parameters, make
from tests.test_torch_contract import NAMES, assert_bitwise, set_gradients, walk

NAN, INF = math.nan, math.inf

OUT_OF_RANGE = [
    *(("lr", value) for value in (-1e-3, NAN, INF, -INF)),
    *(("weight_decay", value) for value in (-0.1, NAN, INF)),
    *(("gamma", value) for value in (-0.1, 1.1, NAN, INF)),
    *(("damping_eps", value) for value in (-1e-8, NAN, INF)),
    *(("scope", value) for value in ("layer", "", None, "Tensor")),
    *(("step_size", value) for value in ("adam", "", None)),
    *(("torque_steps", value) for value in (-1, 1.5, NAN, INF)),
    *(("nonfinite", value) for value in ("ignore", "", None)),
]
ADAM_OUT_OF_RANGE = [
    *(("eps", value) for value in (0.0, -1e-8, NAN, INF)),
    *(("betas", value) for value in ((1.0, 0.9), (-0.1, 0.9), (NAN, 0.9), (INF, 0.9), (0.9, 1.0), (0.9, -0.1))),
    *(("betas", value) for value in ((0.9, NAN), (0.9, INF), (0.9,), (0.9, 0.9, 0.9), 0.9)),
    ("step_size", "sgd"),
]
MOMENTUM_OUT_OF_RANGE = [*(("momentum", value) for value in (-0.1, 1.0, NAN, INF)), ("step_size", "adamw")]

EACH_BAD_VALUE = pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        *((name, *entry) for name in ("AdaTAMW", "AdaTAM") for entry in (*OUT_OF_RANGE, *ADAM_OUT_OF_RANGE)),
        *(("TAM", *entry) for entry in (*OUT_OF_RANGE, *MOMENTUM_OUT_OF_RANGE)),
    ],
)


def _assert_names(error, argument, value):
    """The argument, the value and what is accepted. torch's own words for an argument count as its name."""
    text = str(error)
    words = {"lr": "learning rate", "betas": "beta", "eps": "eps"}
    assert argument in text or words.get(argument, argument) in text
    parts = value if argument == "betas" and isinstance(value, tuple) else (value,)
    assert any(str(part) in text for part in parts)
    assert "must be" in text or "one of" in text or "expected" in text


@EACH_BAD_VALUE
def test_out_of_range(name, argument, value):
    with pytest.raises(ValueError, match=r"\w") as caught:
        make(name, fresh_parameters(), **{argument: value})
    _assert_names(caught.value, argument, value)


@EACH_BAD_VALUE
def test_out_of_range_in_a_group(name, argument, value):
    """In the constructor's groups and in add_param_group, which leaves the optimizer as it was."""
    first, second = fresh_parameters(), fresh_parameters()
    with pytest.raises(ValueError, match=r"\w") as caught:
        make(name, [{"params": first}, {"params": second, argument: value}])
    _assert_names(caught.value, argument, value)
    optimizer = make(name, first)
    with pytest.raises(ValueError, match=r"\w") as caught:
        optimizer.add_param_group({"params": second, argument: value})
    _assert_names(caught.value, argument, value)
    assert len(optimizer.param_groups) == 1


@NAMES
def test_the_ends_of_the_ranges_are_legal(name):
    adam = {} if name == "TAM" else {"betas": (0.0, 0.0)}
    sgd = {"momentum": 0.0} if name == "TAM" else {}
    for gamma in (0.0, 1.0, 0, 1):
        parameters = fresh_parameters()
        optimizer = make(name, parameters, lr=0, weight_decay=0, gamma=gamma, damping_eps=0, **adam, **sgd)
        walk(optimizer, parameters, range(3))
        assert all(bool(parameter.isfinite().all()) for parameter in parameters)


@NAMES
def test_keywords_come_after_the_first_operands(name):
    with pytest.raises(TypeError):
        getattr(hf_tam, name)(fresh_parameters(), 1e-3, (0.9, 0.999), 1e-8, 1e-2, 0.9)
    with pytest.raises(TypeError, match="amsgrad"):
        getattr(hf_tam, name)(fresh_parameters(), amsgrad=True)


# --- as torch, with torch's message --------------------------------------------------------------------------------


def _twice():
    parameter = nn.Parameter(torch.ones(2))
    return [parameter, parameter]


def _in_two_groups():
    parameter = nn.Parameter(torch.ones(2))
    return [{"params": [parameter]}, {"params": [parameter]}]


def _not_a_leaf():
    return [nn.Parameter(torch.ones(2)) * 2]


AS_TORCH = [
    ("twice in a group", _twice, {}),
    ("in two groups", _in_two_groups, {}),
    ("empty list", list, {}),
    ("a tensor", lambda: nn.Parameter(torch.ones(2)), {}),
    ("a set", lambda: [{"params": {nn.Parameter(torch.ones(2))}}], {}),
    ("not tensors", lambda: [1.0, 2.0], {}),
    ("not a leaf", _not_a_leaf, {}),
    ("lr of two elements", fresh_parameters, {"lr": torch.tensor([0.1, 0.2])}),
    ("lr of no element", fresh_parameters, {"lr": torch.tensor([])}),
    ("named and unnamed", lambda: [("weight", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))], {}),
    ("foreach and fused", fresh_parameters, {"foreach": True, "fused": True}),
    ("foreach and tensor lr", fresh_parameters, {"foreach": True, "lr": torch.tensor(0.1)}),
]


def _outcome(optimizer_class, parameters, options):
    """What happens: the exception's type and message, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer_class(parameters, **options)
        except Exception as error:
            return type(error), str(error), [str(entry.message) for entry in caught]
    return None, None, [str(entry.message) for entry in caught]


@pytest.mark.parametrize(("name", "twin"), [("AdaTAMW", torch.optim.AdamW), ("AdaTAM", torch.optim.Adam),
                                            ("TAM", torch.optim.SGD)])  # fmt: skip
@pytest.mark.parametrize(("build", "options"), [entry[1:] for entry in AS_TORCH], ids=[entry[0] for entry in AS_TORCH])
def test_as_torch(name, twin, build, options):
    if name == "TAM" and "fused" in options:
        pytest.skip("TAM has no argument `fused`")
    ours, theirs = (_outcome(each, build(), options) for each in (getattr(hf_tam, name), twin))
    assert ours == theirs


@EVERY_BACKEND
def test_sparse_gradient(name, backend):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = make(name, embedding.parameters(), backend)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


# --- parameters that are not whole tensors in memory -----------------------------------------------------------------


def _zero_step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@EVERY_BACKEND
def test_a_flat_buffer_in_place_of_the_parameters(name, backend):
    """As DeepSpeed ZeRO does: many tensors in one, so an angle of it would be another angle."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(name, model.parameters(), backend)
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"(?i)zero") as caught:
        _zero_step(optimizer)
    assert "attach" in str(caught.value)
    assert torch.equal(flat, before)


@EVERY_BACKEND
def test_a_flat_buffer_after_some_steps(name, backend):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend)
    walk(optimizer, parameters, range(2))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(30))]
    with pytest.raises(RuntimeError, match="parameter"):
        _zero_step(optimizer)


@EVERY_BACKEND
def test_a_slice_of_fsdp1(name, backend):
    """FSDP1 marks what it flattened; without its wrapper nobody knows the process group."""
    parameter = nn.Parameter(torch.ones(6))
    parameter._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="FSDP") as caught:
        _zero_step(make(name, [parameter], backend))
    assert "attach" in str(caught.value)
    assert torch.equal(parameter, torch.ones(6))


@EVERY_BACKEND
def test_a_meta_parameter(name, backend):
    parameter = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        _zero_step(make(name, [parameter], backend))


@EVERY_BACKEND
def test_materialised_after_the_optimizer_was_built(name, backend):
    """attach(module) makes the replaced parameters known."""
    model = nn.Linear(3, 2, device="meta")
    optimizer = make(name, nn.Linear(3, 2).parameters(), backend)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.attach(model)
    _zero_step(optimizer)
    assert all(bool((parameter < 0.5).all()) for parameter in model.parameters())


class Tagged(torch.Tensor):
    """A subclass that only carries a name."""


@EVERY_BACKEND
@SCOPES
def test_a_plain_subclass_is_computed_correctly(name, backend, scope):
    plain = fresh_parameters(((4, 3), (5,)))
    tagged = [nn.Parameter(parameter.detach().clone().as_subclass(Tagged)) for parameter in plain]
    optimizer, twin = make(name, tagged, backend, scope=scope), make(name, plain, backend, scope=scope)
    walk(optimizer, tagged, range(5))
    walk(twin, plain, range(5))
    for mine, their in zip(tagged, plain, strict=True):
        assert isinstance(mine, Tagged)
        torch.testing.assert_close(mine.detach().as_subclass(torch.Tensor), their.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.torque_stats()["torque"], twin.torque_stats()["torque"], rtol=0, atol=1e-6)


def _refusal(optimizer):
    """The message of a refused step, empty if the step was taken."""
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as refusal:
        return str(refusal)
    return ""


@EVERY_BACKEND
def test_a_wrapper_subclass_is_refused_or_correct(name, backend):
    """Its own memory is empty: a raw write would be to nowhere."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    plain = fresh_parameters(((4, 3),))
    wrapped = nn.Parameter(two_tensor.TwoTensor(plain[0].detach().clone(), plain[0].detach().clone()))
    optimizer, twin = make(name, [wrapped], backend), make(name, plain, backend)
    for seed in range(4):
        set_gradients(plain, seed)
        gradient = plain[0].grad
        wrapped.grad = two_tensor.TwoTensor(gradient.clone(), gradient.clone())
        twin.step()
        if seed == 0 and (refusal := _refusal(optimizer)):
            assert "TwoTensor" in refusal
            return
        if seed > 0:
            optimizer.step()
    for part in (wrapped.a, wrapped.b):
        torch.testing.assert_close(part, plain[0].detach(), rtol=1e-6, atol=1e-6)


@EVERY_BACKEND
def test_a_quantised_parameter_is_left_alone(name, backend):
    """It has no gradient and needs none; the others go on."""
    codes = nn.Parameter(torch.arange(6, dtype=torch.int8), requires_grad=False)
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer, twin = make(name, [codes, *parameters], backend), make(name, twins, backend)
    walk(optimizer, parameters, range(3))
    walk(twin, twins, range(3))
    assert torch.equal(codes, torch.arange(6, dtype=torch.int8))
    assert_bitwise(optimizer, parameters, twin, twins)
    assert optimizer.torque_stats()["torque"].shape == (4,)


@pytest.mark.parametrize("backend", backends_of("AdaTAMW"))
def test_tied_memory_of_two_parameters(backend):
    """Two views of one buffer, side by side: neither writes into the other's half."""
    buffer = torch.zeros(2, 5)
    halves = [nn.Parameter(buffer[0]), nn.Parameter(buffer[1])]
    optimizer = make("AdaTAMW", halves, backend, lr=0.5, weight_decay=0.0)
    halves[0].grad = torch.ones(5)
    optimizer.step()
    assert bool((buffer[0] < 0).all())
    assert torch.equal(buffer[1], torch.zeros(5))


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_numbers_of_other_libraries(name):
    """A configuration file read by numpy or pandas has their numbers in it."""
    import numpy

    parameters = fresh_parameters()
    optimizer = make(name, parameters, lr=numpy.float32(0.5), gamma=numpy.float64(0.5), torque_steps=numpy.int64(3))
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"Invalid gamma value: 1\.5"):
        make(name, parameters, gamma=numpy.float64(1.5))


@pytest.mark.parametrize("name", ["AdaTAMW", "AdaTAM", "TAM"])
def test_no_state_dict_at_all(name):
    with pytest.raises(ValueError, match="not the state_dict of an optimizer: it holds \\['model'\\]"):
        make(name, fresh_parameters()).load_state_dict({"model": {}})


@EVERY_BACKEND
def test_named_parameters_replaced_by_a_flat_buffer(name, backend):
    """The refusal with its remedy, not a complaint about the lengths of two lists."""
    model = nn.Linear(3, 2)
    optimizer = make(name, list(model.named_parameters()), backend)
    flat = nn.Parameter(torch.ones(8))
    flat.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"call optimizer\.attach\(module\)"):
        optimizer.step()
