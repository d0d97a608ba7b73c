"""Tensors of one element in every backend: the first step, and a state that was taken away between two steps."""

from __future__ import annotations

import itertools

import torch

from tests.tables import check_rows
from tests.test_properties import EVERY_BACKEND, make

SHAPES = ((1,), (), (1, 1))
GRADIENTS = (1.0, -1.0, -1.0, 0.0, 0.5, -2.0)
KINDS = {"": {}, "nothing kept": {"gamma": 0.0, "damping_eps": 0.0}}
ROWS = {f"scope={scope} {kind}": (scope, kind) for scope, kind in itertools.product(("tensor", "model"), KINDS)}


def optimizer_of(name, backend, scope, kind, *, values=(1.0, -0.5, 2.0)):
    """Three tensors of one element, and an optimizer that remembers little of them."""
    params = [torch.nn.Parameter(torch.full(shape, value)) for shape, value in zip(SHAPES, values, strict=True)]
    options = {"lr": 0.1, "weight_decay": 0.0, "scope": scope, **KINDS[kind]}
    if kind:
        options |= {"momentum": 0.0} if name == "TAM" else {"betas": (0.0, 0.9)}
    return params, make(name, params, backend, **options)


def step(params, optimizer, gradient):
    for param in params:
        param.grad = torch.full_like(param, gradient)
    optimizer.step()


@EVERY_BACKEND
def test_the_first_step_is_torchs(name, backend):
    """Nothing was before it, so there is no angle, and damping 1/2 is the calibrated weight."""

    def check(scope, kind):
        for gradient in (1.0, -3.0, 1e-3):
            params, optimizer = optimizer_of(name, backend, scope, kind)
            twins = [param.detach().clone().requires_grad_() for param in params]
            group = optimizer.param_groups[0]
            options = {"lr": 0.1, "weight_decay": 0.0}
            if name == "TAM":
                twin = torch.optim.SGD(twins, momentum=group["momentum"], **options)
            else:
                twin = torch.optim.AdamW(twins, betas=group["betas"], **options)
            step(params, optimizer, gradient)
            step(twins, twin, gradient)
            for param, other in zip(params, twins, strict=True):
                torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-6, atol=1e-6)
                assert float(optimizer.state[param]["torque"]) == 0.0

    check_rows(check, ROWS)


@EVERY_BACKEND
def test_a_state_that_was_cleared_is_a_first_step(name, backend):
    """Whatever the backend keeps between steps (tables, flat copies) does not outlive `optimizer.state`."""

    def check(scope, kind):
        params, optimizer = optimizer_of(name, backend, scope, kind)
        for gradient in GRADIENTS:
            step(params, optimizer, gradient)
            optimizer.state.clear()
            values = tuple(param.item() for param in params)
            fresh, beside = optimizer_of(name, backend, scope, kind, values=values)
            step(params, optimizer, -gradient)
            step(fresh, beside, -gradient)
            for param, other in zip(params, fresh, strict=True):
                assert torch.equal(param, other)
                mine, theirs = optimizer.state[param], beside.state[other]
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[key], theirs[key]) for key in theirs), (gradient, mine, theirs)

    check_rows(check, ROWS)


@EVERY_BACKEND
def test_the_state_of_one_tensor_may_go_and_those_of_the_others_stay(name, backend):
    def check(scope, kind):
        params, optimizer = optimizer_of(name, backend, scope, kind)
        for gradient in GRADIENTS[:3]:
            step(params, optimizer, gradient)
        del optimizer.state[params[1]]
        step(params, optimizer, 1.0)
        assert [float(optimizer.state[param]["step"]) for param in params] == [4.0, 1.0, 4.0]
        assert all(bool(torch.isfinite(param).all()) for param in params)

    check_rows(check, ROWS)


@EVERY_BACKEND
def test_opposed_numbers_leave_nothing_and_are_finite(name, backend):
    """+1 -1 -1: the second has weight 0, so that of the moment nothing is left and the third meets no angle."""

    def check(scope, kind):
        params, optimizer = optimizer_of(name, backend, scope, kind)
        for gradient in GRADIENTS:
            before = [param.item() for param in params]
            step(params, optimizer, gradient)
            assert all(bool(torch.isfinite(param).all()) for param in params)
            if kind and gradient == -1.0 and float(optimizer.state[params[0]]["step"]) == 2.0:
                moved = [abs(param.item() - old) for param, old in zip(params, before, strict=True)]
                assert max(moved) < 1e-6, moved

    check_rows(check, ROWS)
