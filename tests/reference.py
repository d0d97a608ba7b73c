"""The slow literal twin: torque-aware momentum in float64, one Python loop over tensors, no identity and no shortcut.

It is written from the specification (the paper's recurrence and its calibrated form), imports nothing from hf_tam and
keeps the un-normalised moments, so that agreement with it means something.

    s_t = <m_{t-1}, g_t> / (|m_{t-1}| |g_t|)        S_t = gamma S_{t-1} + (1 - gamma) s_t
    d_t = (1 + S_t) / 2                             c_t = damping_eps + d_t

    paper       m_t = beta1 m_{t-1} + c_t g_t
    calibrated  AdaTAM(W): exp_avg_t = beta1 exp_avg_{t-1} + (1 - beta1) 2 c_t g_t       TAM: buffer_t = 2 m_t

References:
    Torque-Aware Momentum, https://arxiv.org/abs/2412.18790
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ADAM_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "gamma": 0.9,
    "damping_eps": 1e-8,
    "scope": "tensor",
    "step_size": "adamw",
    "torque_steps": None,
    "nonfinite": "skip",
    "maximize": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "AdaTAMW": {**ADAM_DEFAULTS, "weight_decay": 1e-2},
    "AdaTAM": {**ADAM_DEFAULTS, "weight_decay": 0.0},
    "TAM": {**ADAM_DEFAULTS, "weight_decay": 0.0, "momentum": 0.9, "step_size": "sgd"},
}


def real_f64(tensor: Tensor) -> Tensor:
    """A float64 copy; a complex tensor as its real view (a trailing dimension of 2)."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64, copy=True)


@dataclass
class ReferenceState:
    """One logical tensor: its value and its state, float64 throughout."""

    parameter: Tensor
    dtype: torch.dtype
    group: dict[str, Any]
    step: int = 0
    torque: float = 0.0
    cosine: float = 0.0
    first_moment: Tensor = field(init=False)  # m in the paper's form; exp_avg or momentum_buffer in the calibrated one
    exp_avg_sq: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first_moment = torch.zeros_like(self.parameter)
        self.exp_avg_sq = torch.zeros_like(self.parameter)


class ReferenceOptimizer:
    """`name` is the optimizer's class name, `groups` what it would be given as param groups.

    Parameters of 16 bits are rounded to their own dtype after each step, moments included, because there the storage
    and not the arithmetic decides the result; wider ones are never rounded.
    """

    def __init__(self, name: str, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.name = name
        self.groups = [{**DEFAULTS[name], **options, **group} for group in groups]
        self.states = [
            ReferenceState(real_f64(parameter), parameter.dtype, group)
            for group in self.groups
            for parameter in group["params"]
        ]
        self.skipped = 0
        self.grad_norm = 0.0
        self.has_state = False

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step; `gradients` has one entry a parameter, in the order of the groups."""
        present = [
            (state, real_f64(gradient))
            for state, gradient in zip(self.states, gradients, strict=True)
            if gradient is not None
        ]
        self.grad_norm = math.sqrt(sum(float((gradient * gradient).sum()) for _, gradient in present))
        kept = self._without_nonfinite(present)
        effective = [(state, self._effective_gradient(state, gradient)) for state, gradient in kept]
        cosines = self._cosines(effective)
        for (state, gradient), cosine in zip(effective, cosines, strict=True):
            self._update(state, gradient, cosine)
        self._forget_a_step_that_only_made_state(present)

    def _forget_a_step_that_only_made_state(self, present: list[tuple[ReferenceState, Tensor]]) -> None:
        """lr = 0 and nothing but zeros, in the first step there is: as torch.distributed.checkpoint initialises."""
        idle = all(float(state.group["lr"]) == 0.0 and not bool(gradient.any()) for state, gradient in present)
        if present and idle and not self.has_state:
            for state, _ in present:
                state.step, state.torque = 0, 0.0
                state.first_moment.zero_()
                state.exp_avg_sq.zero_()
        self.has_state = self.has_state or bool(present)

    def _without_nonfinite(self, present: list[tuple[ReferenceState, Tensor]]) -> list[tuple[ReferenceState, Tensor]]:
        """nonfinite="skip": leave out the tensor (scope "tensor") or everything (scope "model")."""
        kept = []
        for state, gradient in present:
            if state.group["nonfinite"] == "skip" and not bool(torch.isfinite(gradient).all()):
                self.skipped += 1
                if state.group["scope"] == "model":
                    return []
            else:
                kept.append((state, gradient))
        return kept

    def _effective_gradient(self, state: ReferenceState, gradient: Tensor) -> Tensor:
        if state.group["maximize"]:
            gradient = -gradient
        if self.name != "AdaTAMW":
            gradient = gradient + state.group["weight_decay"] * state.parameter
        return gradient

    def _cosines(self, effective: list[tuple[ReferenceState, Tensor]]) -> list[float]:
        sums = []
        for state, gradient in effective:
            momentum = self._momentum(state)
            sums.append(
                (
                    float((momentum * gradient).sum()),
                    float((momentum * momentum).sum()),
                    float((gradient * gradient).sum()),
                )
            )
        if not effective or effective[0][0].group["scope"] == "tensor":
            return [cosine_of(*entry) for entry in sums]
        shared = cosine_of(*(sum(column) for column in zip(*sums, strict=True)))
        return [shared for _ in sums]

    def _momentum(self, state: ReferenceState) -> Tensor:
        """m of the paper, whatever is kept."""
        if state.group["step_size"] == "paper":
            return state.first_moment
        if self.name == "TAM":
            return state.first_moment / 2
        return state.first_moment / (2 * (1 - float(state.group["betas"][0])))

    def _torque_is_active(self, state: ReferenceState) -> bool:
        return state.group["torque_steps"] is None or state.step < state.group["torque_steps"]

    def _update(self, state: ReferenceState, gradient: Tensor, cosine: float) -> None:
        group = state.group
        paper = group["step_size"] == "paper"
        if self._torque_is_active(state):
            state.cosine = cosine
            state.torque = group["gamma"] * state.torque + (1 - group["gamma"]) * cosine
            coefficient = group["damping_eps"] + (1 + state.torque) / 2
        else:
            coefficient = 1.0 if paper else 0.5
        state.step += 1
        if self.name == "TAM":
            self._update_tam(state, gradient, coefficient)
        else:
            self._update_adatam(state, gradient, coefficient)
        if state.dtype in (torch.float16, torch.bfloat16):
            for tensor in (state.parameter, state.first_moment, state.exp_avg_sq):
                tensor.copy_(tensor.to(state.dtype))

    def _update_tam(self, state: ReferenceState, gradient: Tensor, coefficient: float) -> None:
        scale = 1 if state.group["step_size"] == "paper" else 2
        state.first_moment = state.group["momentum"] * state.first_moment + scale * coefficient * gradient
        state.parameter = state.parameter - float(state.group["lr"]) * state.first_moment

    def _update_adatam(self, state: ReferenceState, gradient: Tensor, coefficient: float) -> None:
        group = state.group
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        state.exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * gradient * gradient
        if self.name == "AdaTAMW":
            state.parameter = state.parameter * (1 - lr * group["weight_decay"])
        if group["step_size"] == "paper":
            state.first_moment = beta1 * state.first_moment + coefficient * gradient
            denom = state.exp_avg_sq.sqrt() + group["eps"]
            state.parameter = state.parameter - lr * state.first_moment / denom
        else:
            state.first_moment = beta1 * state.first_moment + (1 - beta1) * 2 * coefficient * gradient
            denom = (state.exp_avg_sq / (1 - beta2**state.step)).sqrt() + group["eps"]
            state.parameter = state.parameter - lr * (state.first_moment / (1 - beta1**state.step)) / denom


def cosine_of(dot: float, momentum_sq: float, gradient_sq: float) -> float:
    """The cosine from three sums; 0 where an angle does not exist."""
    norms = math.sqrt(momentum_sq) * math.sqrt(gradient_sq)
    cosine = dot / norms if norms else 0.0
    return cosine if math.isfinite(cosine) else 0.0
