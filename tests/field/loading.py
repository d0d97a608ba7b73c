"""Optimizers of ours beside torch's own: what a run saves, and how another one goes on with it."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

import hf_tam

OURS = ("AdaTAMW", "AdaTAM", "TAM")
CLASSES = {
    **{name: getattr(hf_tam, name) for name in OURS},
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}
"""By name; torch's are the controls."""
COUNTERPARTS = {"AdaTAMW": "AdamW", "AdaTAM": "Adam", "TAM": "SGD"}
SHAPES = ((4, 3), (17,), ())
NAMES = ("layer.weight", "layer.bias", "gain")


def parameters_of(dtype=torch.float32, *, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimizer, seed):
    """One step of everything in the groups; the gradients depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


class Run:
    """A run of some steps, and its state_dict, copied."""

    def __init__(self, name, *, steps=3, dtype=torch.float32, named=False, **options):
        self.name, self.dtype = name, dtype
        self.parameters = parameters_of(dtype)
        given = list(zip(NAMES, self.parameters, strict=True)) if named else self.parameters
        self.optimizer = CLASSES[name](given, lr=0.01, **options)
        for seed in range(steps):
            step(self.optimizer, seed)
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def fresh(self, name=None, **options):
        """An optimizer that took no step yet, for parameters of the same values."""
        parameters = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        return CLASSES[name or self.name](parameters, **{"lr": 0.01, **options})

    def resumed(self, saved=None, **options):
        """Another optimizer that has loaded what was saved."""
        optimizer = self.fresh(**options)
        optimizer.load_state_dict(self.saved if saved is None else saved)
        return optimizer

    def assert_goes_on(self, resumed):
        """Both take a step, and end at the same parameters, bit for bit."""
        step(self.optimizer, 99)
        step(resumed, 99)
        for mine, theirs in zip(parameters_in(resumed), self.parameters, strict=True):
            assert torch.equal(mine, theirs)


def parameters_in(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_ours(name):
    return name in OURS
