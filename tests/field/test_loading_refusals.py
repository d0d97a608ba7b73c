"""State_dicts that are another optimizer's, or that lack what cannot be guessed, are refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


class Quantised(torch.Tensor):
    """As torchao's OptimState8bit: codes and a scale, and no memory of its own."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of {cls.__name__}")


@EVERY_OURS
def test_moments_of_an_optimizer_that_quantises_them(name):
    """They were loaded, and the first step wrote to address 0; AdamW raises NotImplementedError at its first step."""
    run = Run(name)
    for state in run.saved["state"].values():
        for key in run.optimizer.moments:
            state[key] = Quantised((state[key] * 100).to(torch.int8), 0.01)
    with pytest.raises(ValueError, match=r"parameter 0 .* is a Quantised"):
        run.resumed()
    for state in run.saved["state"].values():
        for key in run.optimizer.moments:
            state[key] = state[key].dequantize()
    step(run.resumed(), 99)


@EVERY_OURS
def test_moments_that_are_parameters_are_plain(name):
    run = Run(name)
    for state in run.saved["state"].values():
        for key in run.optimizer.moments:
            state[key] = nn.Parameter(state[key], requires_grad=False)
    run.assert_goes_on(run.resumed())
