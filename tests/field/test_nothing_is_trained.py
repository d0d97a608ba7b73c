"""An optimizer none of whose parameters ever has a gradient says so, once; others say nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

import hf_tam

SAID = "none of the optimizer's parameters has had a gradient"


def _warnings_of(optimizer, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return [str(warning.message) for warning in caught]


def test_weights_assigned_after_the_optimizer_was_built():
    """`load_state_dict(assign=True)`: the optimizer holds what the model had before."""
    model = torch.nn.Linear(3, 2)
    optimizer = hf_tam.AdaTAMW(model.parameters())
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    said = []
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
        said += _warnings_of(optimizer, 1)
    assert [SAID in message for message in said] == [True]


@pytest.mark.parametrize("cls", [hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"max_grad_norm": 1.0}, {"scope": "model"}], ids=str)
def test_a_frozen_model(cls, options):
    parameters = [torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    said = _warnings_of(cls(parameters, **options), 5)
    assert [SAID in message for message in said] == [True]


def test_one_empty_step_before_the_first():
    """To satisfy a scheduler that wants step() before it."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_tam.AdaTAMW([parameter])
    assert not _warnings_of(optimizer, 1)
    parameter.grad = torch.ones(3)
    assert not _warnings_of(optimizer, 1)


def test_steps_without_gradient_later_on():
    """A critic that rests, accumulation that skips: nothing is wrong."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hf_tam.AdaTAMW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    parameter.grad = None
    assert not _warnings_of(optimizer, 5)


def test_no_parameter_at_all():
    """torch allows an empty group."""
    assert all(SAID in message for message in _warnings_of(hf_tam.AdaTAMW([{"params": []}]), 3))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, hf_tam.AdaTAMW, hf_tam.AdaTAM, hf_tam.TAM])
def test_an_optimizer_whose_groups_were_all_removed(cls):
    optimizer = cls([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.param_groups.clear()
    optimizer.step()
    assert not optimizer.state
