"""GradScaler, autocast and what they do to a step."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from tests.tables import check_rows
from tests.test_properties import EVERY_BACKEND, fresh_parameters, make
from tests.test_torch_contract import assert_bitwise, set_gradients, walk


def _snapshot(optimizer, parameters):
    return [
        [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
        for parameter in parameters
    ]


@EVERY_BACKEND
def test_grad_scaler(name, backend):
    """Scaled steps equal unscaled ones; found_inf leaves parameters and every state as they were."""
    rows = itertools.product(("tensor", "model"), (float("inf"), float("nan")), ("skip", "raise", "propagate"))
    check_rows(_scales, {f"scope={row[0]} {row[1]} nonfinite={row[2]}": (name, backend, *row) for row in rows})


def _scales(name, backend, scope, bad, nonfinite):
    parameters, twins = fresh_parameters(), fresh_parameters()
    optimizer = make(name, parameters, backend, scope=scope, nonfinite=nonfinite)
    twin = make(name, twins, backend, scope=scope, nonfinite=nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled_step():
        for parameter in parameters:
            parameter.grad *= scaler.get_scale()
        scaler.scale(torch.ones(()))  # initialises the scaler
        scaler.step(optimizer)
        scaler.update()

    for seed in range(6):
        if seed == 3:
            set_gradients(parameters, 0)
            parameters[1].grad[2] = bad
            before, scale = _snapshot(optimizer, parameters), scaler.get_scale()
            scaled_step()
            assert scaler.get_scale() == scale / 2
            for old, new in zip(before, _snapshot(optimizer, parameters), strict=True):
                assert all(torch.equal(left, right) for left, right in zip(old, new, strict=True))
        set_gradients(parameters, seed)
        scaled_step()
        walk(twin, twins, [seed])
    assert_bitwise(optimizer, parameters, twin, twins)


@EVERY_BACKEND
def test_step_under_autocast(name, backend):
    """A step inside the context is the step outside it: no dot product in bf16."""
    parameters, twins = fresh_parameters(((40, 30),)), fresh_parameters(((40, 30),))
    optimizer, twin = make(name, parameters, backend), make(name, twins, backend)
    for seed in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            walk(optimizer, parameters, [seed])
        walk(twin, twins, [seed])
    assert_bitwise(optimizer, parameters, twin, twins)


@EVERY_BACKEND
def test_training_under_autocast(name, backend):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = make(name, model.parameters(), backend, lr=0.01)
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(inputs).squeeze(1) - inputs.sum(1)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
