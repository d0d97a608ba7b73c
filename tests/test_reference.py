"""The reference itself, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.reference import ReferenceOptimizer

RIGHT, UP = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def _walk(name, gradients, **options):
    reference = ReferenceOptimizer(name, [{"params": [torch.zeros(2)]}], **options)
    states = []
    for gradient in gradients:
        reference.step([gradient])
        (state,) = reference.states
        states.append((state.torque, state.first_moment.tolist(), state.parameter.tolist()))
    return states


def test_tam_of_the_paper():
    """S: 0, 0.1, 0.09; c: 0.5, 0.55, 0.545; m = 0.9 m + c g."""
    states = _walk("TAM", [RIGHT, RIGHT, UP], lr=1.0, step_size="paper", damping_eps=0.0)
    assert [torque for torque, _, _ in states] == pytest.approx([0.0, 0.1, 0.09])
    assert [moment for _, moment, _ in states] == [
        pytest.approx([0.5, 0.0]),
        pytest.approx([1.0, 0.0]),
        pytest.approx([0.9, 0.545]),
    ]
    assert states[-1][2] == pytest.approx([-2.4, -0.545])


def test_calibrated_tam_is_twice_the_paper():
    paper = _walk("TAM", [RIGHT, RIGHT, UP], lr=1.0, step_size="paper")
    calibrated = _walk("TAM", [RIGHT, RIGHT, UP], lr=1.0)
    for (torque, moment, _), (same_torque, buffer, _) in zip(paper, calibrated, strict=True):
        assert same_torque == torque
        assert buffer == pytest.approx([2 * value for value in moment])


def test_adatamw_of_the_paper():
    """One step from 0: m = 0.5 g, v = 0.1 g^2, no bias correction."""
    ((torque, moment, parameter),) = _walk(
        "AdaTAMW", [3 * RIGHT], lr=1.0, betas=(0.9, 0.9), step_size="paper", damping_eps=0.0, eps=1e-12
    )
    assert torque == 0.0
    assert moment == pytest.approx([1.5, 0.0])
    assert parameter == pytest.approx([-1.5 / (3 * math.sqrt(0.1)), 0.0])


def test_calibrated_adatamw():
    """The first step is AdamW's, lr times the sign; in the second S = 0.1 weighs the gradient by 1.1."""
    first, second = _walk("AdaTAMW", [3 * RIGHT, 3 * RIGHT], lr=1.0, damping_eps=0.0, eps=1e-12, weight_decay=0.5)
    assert first[2] == pytest.approx([-1.0, 0.0])
    assert second[1] == pytest.approx([0.9 * 0.3 + 0.1 * 1.1 * 3, 0.0])
    assert second[2] == pytest.approx([-0.5 - (0.9 * 0.1 + 0.11) / 0.19, 0.0])


def test_coupled_decay_enters_the_angle():
    """The gradient is orthogonal to the momentum, but with 1 * theta added it points back along it."""
    reference = ReferenceOptimizer("TAM", [{"params": [torch.zeros(2)]}], lr=1.0, weight_decay=1.0, damping_eps=0.0)
    reference.step([RIGHT])
    reference.step([UP])
    (state,) = reference.states
    assert state.cosine == pytest.approx(-math.sqrt(0.5))  # <(1, 0), (-1, 1)> / sqrt(2)


def test_one_angle_for_the_model():
    """Two tensors, one aligned, one opposed and twice as large: (1 - 4) / 5."""
    reference = ReferenceOptimizer("TAM", [{"params": [torch.zeros(2), torch.zeros(2)]}], scope="model")
    reference.step([RIGHT, 2 * UP])
    reference.step([RIGHT, -2 * UP])
    assert [state.cosine for state in reference.states] == pytest.approx([-0.6, -0.6])
