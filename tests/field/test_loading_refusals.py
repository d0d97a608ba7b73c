"""State_dicts that are another optimizer's, or that lack what cannot be guessed, are refused with the reason."""

from __future__ import annotations

import pytest
import torch

import hf_tam
from tests.field.loading import CLASSES, OURS, Run, is_ours, parameters_of, step

EVERY_OURS = pytest.mark.parametrize("name", OURS)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("kind", ["absent", "none"])
def test_an_adam_state_that_lacks_what_cannot_be_guessed(key, kind):
    """AdamW fails as well, at this load or at the next step."""
    for name in ("AdaTAMW", "AdamW"):
        run = Run(name)
        if kind == "absent":
            del run.saved["state"][1][key]
        else:
            run.saved["state"][1][key] = None
        if is_ours(name):
            with pytest.raises(ValueError, match=rf"parameter 1 .*lacks \['{key}'\]"):
                run.resumed()
        else:
            with pytest.raises((KeyError, TypeError, AttributeError)):
                step(run.resumed(), 99)


@EVERY_OURS
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("torque", torch.zeros(2), r"torque of parameter 0 .*shape \(2,\)"), ("step", "three", "step of .* no number")],
)
def test_a_scalar_that_is_none(name, key, value, words):
    run = Run(name)
    run.saved["state"][0][key] = value
    with pytest.raises(ValueError, match=words):
        run.resumed()


@EVERY_OURS
def test_a_state_that_is_no_dict(name):
    run = Run(name)
    run.saved["state"][1] = None
    with pytest.raises(ValueError, match=r"parameter 1 .* is None"):
        run.resumed()


OTHERS = {
    "NAdam": torch.optim.NAdam,
    "NAdam decoupled": lambda parameters: torch.optim.NAdam(parameters, decoupled_weight_decay=True),
    "RAdam": torch.optim.RAdam,
    "RAdam decoupled": lambda parameters: torch.optim.RAdam(parameters, decoupled_weight_decay=True),
    "Adamax": torch.optim.Adamax,
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, momentum=0.9),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


@EVERY_OURS
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_another_of_torchs_optimizers(name, other, steps):
    """Before its first step as well, when its hyperparameters alone would be taken over."""
    theirs = OTHERS[other](parameters_of())
    for seed in range(steps):
        step(theirs, seed)
    ours = CLASSES[name](parameters_of(), lr=0.01)
    with pytest.raises(ValueError, match=f"another optimizer's than {name}'s"):
        ours.load_state_dict(theirs.state_dict())
    step(ours, 0)


def test_muon_is_refused():
    matrices = parameters_of(shapes=((4, 3),))
    theirs = torch.optim.Muon(matrices, nesterov=False)
    with pytest.raises(ValueError, match="Muon"):
        hf_tam.TAM(parameters_of(shapes=((4, 3),))).load_state_dict(theirs.state_dict())
