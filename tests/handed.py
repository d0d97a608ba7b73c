"""What a backend is handed, made by hand."""

from __future__ import annotations

import torch

from hf_tam.backends.tensors import Tensors, look
from hf_tam.update import adam_numbers, sgd_numbers

ADAM = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "gamma": 0.9, "damping_eps": 1e-8,
    "torque_steps": None, "step_size": "adamw",
}  # fmt: skip
SGD = {
    "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0, "gamma": 0.9, "damping_eps": 1e-8, "torque_steps": None,
    "step_size": "sgd",
}  # fmt: skip


def numbers_of(*, adaptive=True, coupled=False, **options):
    """`Numbers` of a param group with these options."""
    return adam_numbers({**ADAM, **options}, coupled=coupled) if adaptive else sgd_numbers({**SGD, **options})


def hand(params, grads, firsts, seconds, *, known=None, numbers=None, groups=None, maximize=False, **options):
    """`Tensors` of these lists; `options` are those of `numbers_of`."""
    if numbers is None:
        numbers = [numbers_of(adaptive=bool(seconds), **options)]
    tensors = Tensors(
        params, grads, firsts, seconds, numbers=numbers, groups=groups or [0] * len(params), maximize=maximize
    )
    tensors.memory, tensors.fits = look(tensors, known=known, name=str)
    return tensors


def handed_again(tensors, **changes):
    """The same lists, whatever they hold by now, with what is known of them from before."""
    lists = (tensors.params, tensors.grads, tensors.firsts, tensors.seconds)
    options = {"numbers": tensors.numbers, "groups": tensors.groups, "maximize": tensors.maximize, **changes}
    return hand(*lists, known=tensors.memory, **options)


def mid_training(params, *, seed=0, **options):
    """Moments that are not zero, gradients at random, in the parameters' memory order."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        return torch.empty_like(tensor).copy_(torch.randn(tensor.shape, generator=generator))

    lists = [], [], []
    for param in params:
        lists[0].append(like(param))
        lists[1].append(like(param))
        lists[2].append(like(param).square())
    return hand(params, *lists, **options)
