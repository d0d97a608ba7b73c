"""The scalar stage by itself: torch, C, Triton and a float64 transcription give one answer to whatever comes."""

from __future__ import annotations

import ctypes
import math
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_tam
from hf_tam.backends import native
from hf_tam.backends.native import library
from hf_tam.update import Numbers, scalar_stage
from tests.handed import numbers_of
from tests.reference import cosine_of

SIZE = 6  # of the larger row of coefficients


# --- the four, each from floats to floats ---------------------------------------------------------------------------


def by_reference(rule, group, sums, states):
    """As tests/reference.py has it: the paper's recurrence, of the moment as AdamW or SGD keeps it."""
    dot, momentum_sq, grad_sq = sums
    step, scale, torque = states["step"], states.get("exp_avg_scale"), states["torque"]
    paper = group["step_size"] == "paper"
    cosine = 0.0
    if scale is None or scale > 0.0:
        try:
            cosine = cosine_of(dot, momentum_sq, grad_sq) if momentum_sq >= 0.0 and grad_sq >= 0.0 else 0.0
        except OverflowError:
            cosine = 0.0
    cosine = min(max(cosine, -1.0), 1.0)
    acts = group["torque_steps"] is None or step < group["torque_steps"]
    if acts:
        torque = group["gamma"] * torque + (1 - group["gamma"]) * cosine
        damping = (1 + torque) / 2
        factor = group["damping_eps"] + damping
    else:
        damping = factor = 1.0 if paper else 0.5
    step += 1
    if rule == "sgd":
        gain = factor if paper else 2 * factor
        return {"step": step, "torque": torque}, [group["momentum"], gain, group["lr"]], cosine, damping
    beta1, beta2 = group["betas"]
    gain = factor if paper else 2 * (1 - beta1) * factor
    scale = beta1 * scale + gain
    first, second = (1.0, 1.0) if paper else (1 - beta1**step, 1 - beta2**step)
    coefficients = [
        1 - group["lr"] * (0.0 if group["coupled"] else group["weight_decay"]),
        gain / scale if scale > 0 else 1.0,
        beta2,
        1 - beta2,
        group["lr"] * scale * math.sqrt(second) / first,
        group["eps"] * math.sqrt(second),
    ]
    return {"step": step, "exp_avg_scale": scale, "torque": torque}, coefficients, cosine, damping


def by_torch(numbers, sums, states):
    tensors = {key: torch.tensor([value], dtype=torch.float64) for key, value in states.items()}
    stage = scalar_stage([torch.tensor([value], dtype=torch.float64) for value in sums], tensors, numbers)
    return (
        {key: float(value) for key, value in stage.states.items()},
        [float(column) for column in stage.coefficients],
        float(stage.cosine),
        float(stage.damping),
    )


def by_torch_with_columns(numbers, sums, states):
    """Hyperparameters that differ by tensor come as tensors."""
    columns = Numbers(*(torch.tensor([value], dtype=torch.float64) for value in numbers))
    return by_torch(columns, sums, states)


def by_c(numbers, sums, states):
    kernels = library.load()
    adaptive = "exp_avg_scale" in states
    scalars, reports = array("f", states.values()), array("d", [*sums, sums[2], 0.0, 0.0])
    groups, settings_, out = array("q", [0]), array("d", numbers.floats()), array("d", [0.0] * SIZE)
    kernels.hf_tam_scalar_stage(
        1, settings_.buffer_info()[0], int(adaptive), groups.buffer_info()[0], scalars.buffer_info()[0],
        reports.buffer_info()[0], out.buffer_info()[0],
    )  # fmt: skip
    count = SIZE if adaptive else 3
    return dict(zip(states, scalars, strict=True)), list(out)[:count], reports[4], reports[5]


def by_triton(numbers, sums, states):
    from tests.triton_backend.stage_kernel import stage_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.tensor([*sums, *states.values()], dtype=torch.float64, device=device)
    fields = torch.tensor(numbers.floats(), dtype=torch.float64, device=device)
    out = torch.zeros(11, dtype=torch.float64, device=device)
    stage_kernel[(1,)](before, fields, out, ADAM="exp_avg_scale" in states)
    found, count = out.tolist(), len(states)
    size = SIZE if "exp_avg_scale" in states else 3
    new = dict(zip(states, found[:count], strict=True))
    return new, found[count + 2 : count + 2 + size], found[count], found[count + 1]


# --- whatever comes -------------------------------------------------------------------------------------------------

EXTREMES = [0.0, 1.0, 5e-324, 1e-300, 1e300, math.inf, math.nan]
squares = st.one_of(st.sampled_from(EXTREMES), st.floats(0.0, 1e6))
dots = st.one_of(st.sampled_from([*EXTREMES, -1.0, -1e300, -math.inf]), st.floats(-1e6, 1e6))
shares = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.floats(0.0, 0.9999))
SHARED = {
    "lr": st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "gamma": st.one_of(st.sampled_from([0.0, 0.9, 1.0]), st.floats(0.0, 1.0)),
    "damping_eps": st.sampled_from([0.0, 1e-8, 0.3]),
    "torque_steps": st.sampled_from([None, 0, 1, 3, 1000]),
    "step_size": st.sampled_from(["adamw", "paper"]),
}
RULES = {
    "adam": (
        st.fixed_dictionaries(
            {
                **SHARED,
                "betas": st.tuples(shares, shares),
                "eps": st.sampled_from([1e-8, 0.5]),
                "coupled": st.booleans(),
            }
        ),
        ("step", "exp_avg_scale", "torque"),
    ),
    "sgd": (st.fixed_dictionaries({**SHARED, "momentum": shares}), ("step", "torque")),
}


def fp32(value):
    return ctypes.c_float(value).value


@st.composite
def stages(draw, rule):
    """Hyperparameters, sums and states; of one element the sums are one number's, and the cosine is -1, 0 or 1."""
    options, keys = RULES[rule]
    group = draw(options)
    if draw(st.booleans()):
        momentum, grad = draw(st.floats(-10.0, 10.0)), draw(st.floats(-10.0, 10.0))
        sums = [momentum * grad, momentum * momentum, grad * grad]
    else:
        sums = [draw(dots), draw(squares), draw(squares)]
    limit = group["torque_steps"] or 0
    states = {
        "step": float(draw(st.sampled_from([0, 1, 2, 100, 1_000_001, max(limit - 1, 0), limit, limit + 1]))),
        "exp_avg_scale": fp32(draw(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 7.0]))),
        "torque": fp32(draw(st.floats(-1.0, 1.0))),
    }
    return group, sums, {key: states[key] for key in keys}


def assert_same_stage(found, expected, *, rtol):
    states, coefficients, cosine, damping = found
    for key, value in expected[0].items():
        assert states[key] == pytest.approx(value, rel=max(rtol, 2**-23), abs=1e-37, nan_ok=True), key
    assert coefficients == pytest.approx(expected[1], rel=rtol, abs=1e-300, nan_ok=True)
    assert cosine == pytest.approx(expected[2], rel=rtol, abs=1e-15)
    assert damping == pytest.approx(expected[3], rel=rtol, abs=1e-15)


DIALECTS = {
    "torch": by_torch,
    "torch, hyperparameters by tensor": by_torch_with_columns,
    "C": by_c,
    "Triton": by_triton,
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
@settings(max_examples=settings().max_examples * 12)
def test_a_dialect_is_the_reference(rule, dialect, data):
    """To 1e-9: 1 - beta^t loses digits in the reference, where beta is near 1; states as fp32 holds them."""
    if dialect == "C" and not native.is_available():
        pytest.skip("needs a C compiler")
    if dialect == "Triton":
        pytest.importorskip("triton")
        from tests import interpreting

        interpreting.prepare()
    group, sums, states = data.draw(stages(rule))
    numbers = numbers_of(adaptive=rule == "adam", **group)
    expected = by_reference(rule, group, sums, dict(states))
    assert_same_stage(DIALECTS[dialect](numbers, sums, dict(states)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": False, "fused": False},
        {"foreach": True},
        {"capturable": True},
        {"max_grad_norm": 1e9},
        {"scope": "model"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", [True, False])
def test_a_moment_of_which_nothing_is_left_has_no_angle(options, kernels, monkeypatch):
    """One element, nothing kept, gradients +1 -1 -1: opposed, the second has weight 0, and the moment scale 0."""
    if not kernels:
        monkeypatch.setattr("hf_tam.backends.native.is_available", lambda: False)
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = hf_tam.AdaTAMW(
        [parameter], lr=0.1, betas=(0.0, 0.9), gamma=0.0, damping_eps=0.0, weight_decay=0.0, **options
    )
    for grad in (1.0, -1.0, -1.0):
        parameter.grad = torch.tensor([grad])
        optimizer.step()
    assert float(parameter) == pytest.approx(1.0, abs=1e-6)
