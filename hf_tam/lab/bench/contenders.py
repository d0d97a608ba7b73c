"""The optimizers that can be compared, each with what the comparison must know of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_tam.optim import TAM, AdaTAM, AdaTAMW

__all__ = ["CONTENDERS", "MAX_GRAD_NORM", "Contender", "is_installed", "layerwise"]

MAX_GRAD_NORM = 1.0
"""The Trainer's default. How small it is does not matter here: torch multiplies by the factor even where it is 1."""

_LR = 1e-5
"""Small, because all contenders step the same parameters."""


@dataclass(frozen=True)
class Contender:
    """An optimizer of the comparison.

    Attributes:
        make: Builds it for parameters, or for param groups; ours take max_grad_norm too.
        what: For --help.
        baseline: The contender it is compared with, unless --against names another.
        clips: Whether it clips inside the step; otherwise torch's clip_grad_norm_ is called before.
        moments: How many states of the parameter's size it keeps, to know beforehand what fits the memory.
        accesses: How often an element of memory must be read or written in a step, for the bandwidth: parameter,
            gradient and moments in, parameter and moments out (7, SGD 5), and moment and gradient once more for the
            angle. None where that is not known.
        package: Which must be installed.
    """

    make: Callable[..., Optimizer]
    what: str
    baseline: str = "adamw"
    clips: bool = False
    moments: int = 2
    accesses: int | None = 7
    package: str | None = None

    def accesses_with(self, *, clip: bool) -> int | None:
        """With clip_grad_norm_ before the step the gradient is read, read again and written: 3 more."""
        if self.accesses is None or self.clips or not clip:
            return self.accesses
        return self.accesses + 3


def is_installed(contender: Contender) -> bool:
    """Whether its package is there."""
    return contender.package is None or importlib.util.find_spec(contender.package) is not None


Handed = list[Tensor] | list[dict[str, Any]]
"""Parameters, or param groups."""


def layerwise(params: list[Tensor]) -> list[dict[str, Any]]:
    """A param group for each parameter, with a learning rate of its own."""
    return [{"params": [param], "lr": _LR * (1.0 + at / len(params))} for at, param in enumerate(params)]


def _adamw(params: Handed, **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=_LR, **options)


def _sgd(params: Handed) -> Optimizer:
    # torch 2.13's fused SGD is wrong on the CPU in 16 bits, so nobody can train with it.
    first = params[0]["params"][0] if isinstance(params[0], dict) else params[0]
    is_right = first.device.type != "cpu" or first.dtype == torch.float32
    return torch.optim.SGD(params, lr=_LR, momentum=0.9, fused=is_right or None)


def _ours(cls: Callable[..., Optimizer], params: Handed, **options: Any) -> Optimizer:
    return cls(params, lr=_LR, **options)


def _foreign(module: str, name: str, params: Handed) -> Optimizer:
    optimizer: Optimizer = getattr(importlib.import_module(module), name)(params, lr=_LR)
    return optimizer


CONTENDERS = {
    "adamw": Contender(partial(_adamw, fused=True), "torch.optim.AdamW(fused=True)"),
    "adamw-foreach": Contender(partial(_adamw, foreach=True), "torch.optim.AdamW(foreach=True)"),
    "adamw-loop": Contender(partial(_adamw, foreach=False), "torch.optim.AdamW(foreach=False)"),
    "adatamw": Contender(partial(_ours, AdaTAMW), "AdaTAMW as it comes", clips=True, accesses=9),
    "adatamw-fused": Contender(partial(_ours, AdaTAMW, fused=True), "AdaTAMW(fused=True)", clips=True, accesses=9),
    "adatamw-foreach": Contender(
        partial(_ours, AdaTAMW, foreach=True), "AdaTAMW(foreach=True)", clips=True, accesses=9
    ),
    "adatamw-single": Contender(
        partial(_ours, AdaTAMW, foreach=False, fused=False),
        "AdaTAMW(foreach=False, fused=False)",
        clips=True,
        accesses=9,
    ),
    "adatamw-bits16": Contender(
        partial(_ours, AdaTAMW, param_correction="bits16"),
        "AdaTAMW(param_correction='bits16'): in bfloat16, weights that lose no step",
        clips=True,
        moments=3,
        accesses=11,
    ),
    "adatamw-bits16-state32": Contender(
        partial(_ours, AdaTAMW, param_correction="bits16", state_bits=32),
        "the same with moments in fp32",
        clips=True,
        moments=5,
        accesses=None,
    ),
    "adatam": Contender(partial(_ours, AdaTAM), "AdaTAM as it comes", clips=True, accesses=9),
    "sgd": Contender(
        _sgd, "torch.optim.SGD(momentum=0.9), fused where that is right", baseline="sgd", moments=1, accesses=5
    ),
    "tam": Contender(
        partial(_ours, TAM), "TAM as it comes, beside sgd", baseline="sgd", clips=True, moments=1, accesses=7
    ),
    "pytorch_optimizer.AdaTAM": Contender(
        partial(_foreign, "pytorch_optimizer", "AdaTAM"),
        "the AdaTAM of pytorch_optimizer, if installed",
        moments=3,
        accesses=None,
        package="pytorch_optimizer",
    ),
    "bitsandbytes.AdamW8bit": Contender(
        partial(_foreign, "bitsandbytes.optim", "AdamW8bit"),
        "8-bit states, if bitsandbytes is installed",
        accesses=None,
        package="bitsandbytes",
    ),
}
