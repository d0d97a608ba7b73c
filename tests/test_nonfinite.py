"""NaN and Inf in gradients, by `nonfinite`; what was skipped is as if the gradient had been None."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from tests.cases import backends_of
from tests.test_properties import EVERY_BACKEND, SCOPES, fresh_parameters, make
from tests.test_torch_contract import NAMES, assert_bitwise, set_gradients, walk

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
BAD_STEPS = (2, 5)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _walk_with(optimizer, parameters, bad, *, which=1, steps=range(8)):
    """Sets one element of one gradient to `bad` in BAD_STEPS."""
    for seed in steps:
        set_gradients(parameters, seed)
        if seed in BAD_STEPS:
            parameters[which].grad.view(-1)[-1] = bad
        optimizer.step()


def _walk_without(optimizer, parameters, missing, steps=range(8)):
    """Leaves out the gradients of `missing` in BAD_STEPS."""
    for seed in steps:
        set_gradients(parameters, seed)
        if seed in BAD_STEPS:
            for index in missing:
                parameters[index].grad = None
        optimizer.step()


@EVERY_BACKEND
@SCOPES
@BAD
@pytest.mark.usefixtures("quiet")
def test_skip(name, backend, scope, bad):
    """Scope "tensor": that tensor sat out; scope "model": all did. To the last bit, and counted."""
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer, twin = make(name, parameters, backend, scope=scope), make(name, twins, backend, scope=scope)
    _walk_with(optimizer, parameters, bad)
    _walk_without(twin, twins, missing=[1] if scope == "tensor" else [0, 1, 2])
    assert_bitwise(optimizer, parameters, twin, twins)
    stats = optimizer.torque_stats()
    assert stats["skipped"].shape == ()
    assert int(stats["skipped"]) == 2
    assert int(twin.torque_stats()["skipped"]) == 0
    assert bool(stats["torque"].isfinite().all())


@EVERY_BACKEND
@SCOPES
@pytest.mark.usefixtures("quiet")
def test_skip_in_the_very_first_step(name, backend, scope):
    """The state that this step created says step 0, and the next step is the first one."""
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer, twin = make(name, parameters, backend, scope=scope), make(name, twins, backend, scope=scope)
    set_gradients(parameters, 0)
    for parameter in parameters:
        parameter.grad.fill_(math.nan)
    optimizer.step()
    for mine, their in zip(parameters, twins, strict=True):
        assert torch.equal(mine, their)
        assert float(optimizer.state[mine].get("step", 0)) == 0
    walk(optimizer, parameters, range(3))
    walk(twin, twins, range(3))
    assert_bitwise(optimizer, parameters, twin, twins)


@EVERY_BACKEND
@pytest.mark.usefixtures("quiet")
def test_skip_counts_tensors(name, backend):
    """Scope "tensor": two tensors in one step are two."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend)
    set_gradients(parameters, 0)
    parameters[0].grad[0, 0] = math.nan
    parameters[2].grad.fill_(math.inf)
    optimizer.step()
    assert int(optimizer.torque_stats()["skipped"]) == 2


@EVERY_BACKEND
@SCOPES
def test_skip_warns_once(name, backend, scope):
    """At the step itself where the host may look, else when the count is read."""
    parameters = fresh_parameters()
    optimizer = make(name, parameters, backend, scope=scope)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _walk_with(optimizer, parameters, math.nan)
        if not backend.startswith("capturable"):
            assert len(caught) == 1
        optimizer.state_dict()
        int(optimizer.torque_stats()["skipped"])
        optimizer.state_dict()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "skip" in text
    assert "nonfinite" in text


@EVERY_BACKEND
@SCOPES
@BAD
def test_raise(name, backend, scope, bad):
    """Names the parameter, and nothing has changed."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters = list(model.parameters())
    optimizer = make(name, model.named_parameters(), backend, scope=scope, nonfinite="raise")
    walk(optimizer, parameters, range(3))
    before = [parameter.detach().clone() for parameter in parameters]
    states = [{key: value.clone() for key, value in optimizer.state[parameter].items()} for parameter in parameters]
    set_gradients(parameters, 3)
    parameters[2].grad[1, 1] = bad
    with pytest.raises(FloatingPointError, match=r"1\.weight"):
        optimizer.step()
    for parameter, old, state in zip(parameters, before, states, strict=True):
        assert torch.equal(parameter, old)
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    walk(optimizer, parameters, [3])
    assert float(optimizer.state[parameters[2]]["step"]) == 4


@NAMES
def test_raise_without_names(name):
    parameters = fresh_parameters()
    optimizer = make(name, parameters, nonfinite="raise")
    set_gradients(parameters, 0)
    parameters[1].grad[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"\b1\b"):
        optimizer.step()


@EVERY_BACKEND
@SCOPES
@BAD
def test_propagate(name, backend, scope, bad):
    """As torch: the same elements become NaN, no others. The torque stays finite all the same."""
    twin_class = {"AdaTAMW": torch.optim.AdamW, "AdaTAM": torch.optim.Adam, "TAM": torch.optim.SGD}[name]
    parameters, twins = fresh_parameters(), fresh_parameters()
    options = {"momentum": 0.9} if name == "TAM" else {}
    optimizer = make(name, parameters, backend, scope=scope, nonfinite="propagate")
    twin = twin_class(twins, lr=1e-3, **options)
    for walker, its in ((optimizer, parameters), (twin, twins)):
        _walk_with(walker, its, bad)
    for mine, their in zip(parameters, twins, strict=True):
        assert torch.equal(mine.isnan(), their.isnan())
    assert bool(parameters[1].isnan().any()) == bool(twins[1].isnan().any())
    stats = optimizer.torque_stats()
    assert bool(stats["torque"].isfinite().all())
    assert bool(stats["cosine"].isfinite().all())
    assert int(stats["skipped"]) == 0
    assert all(float(optimizer.state[parameter]["step"]) == 8 for parameter in parameters)


@EVERY_BACKEND
@SCOPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.usefixtures("quiet")
def test_skip_in_other_dtypes(name, backend, scope, dtype):
    parameters = [nn.Parameter(torch.ones(5, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = make(name, parameters, backend, scope=scope, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad[2] = complex(1.0, math.nan) if dtype.is_complex else math.nan
    optimizer.step()
    assert torch.equal(parameters[0], torch.ones(5, dtype=dtype))
    assert torch.equal(parameters[1], torch.ones(3, dtype=dtype)) == (scope == "model")
    assert int(optimizer.torque_stats()["skipped"]) == 1


@EVERY_BACKEND
@pytest.mark.usefixtures("quiet")
def test_skip_with_inf_that_cancels(name, backend):
    """+inf and -inf, and a finite gradient whose sum overflows, are told apart by their elements."""
    parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = make(name, parameters, backend, lr=1e-30)
    parameters[0].grad = torch.tensor([math.inf, -math.inf, 0.0, 0.0])
    parameters[1].grad = torch.full((4,), 3e38)
    optimizer.step()
    assert int(optimizer.torque_stats()["skipped"]) == 1
    assert torch.equal(parameters[0], torch.ones(4))
    assert float(optimizer.state[parameters[1]]["step"]) == 1


@pytest.mark.parametrize("backend", backends_of("AdaTAMW"))
@pytest.mark.usefixtures("quiet")
def test_skip_after_torque_steps(backend):
    """Where no dot product is taken any more a NaN is still seen."""
    parameters = fresh_parameters()
    optimizer = make("AdaTAMW", parameters, backend, torque_steps=1)
    _walk_with(optimizer, parameters, math.nan)
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    assert float(optimizer.state[parameters[1]]["step"]) == 6
    assert int(optimizer.torque_stats()["skipped"]) == 2
