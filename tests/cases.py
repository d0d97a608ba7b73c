"""The frozen list of cases that every backend is held to, and the tolerance for each dtype.

A case says which optimizer, which parameters (shape, dtype, memory layout), which gradients come when, and which
hyperparameters move. Gradients do not depend on the parameters, so rounding errors add up and never feed back.
Add a case here and it is compared with the reference, and between the backends, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """`state` is relative to the largest value of the reference tensor, `torque` absolute; parameters have both."""

    parameter_rtol: float
    parameter_atol: float
    state: float
    torque: float


# float64, float32: torque and scale of the first moment are fp32 (2^-24 = 6e-8), and an error in them reaches every
# element; the moments average some 10 to 20 of these. A dot product in fp32 adds up to sqrt(n) 6e-8, n <= 3e5.
# bfloat16, float16: ten steps, and at each one rounding (half an ulp, 2^-9 or 2^-12) of the parameter, of both moments
# and, in the readable backend, of each of their two terms. Parameters of order 1 may end two ulps apart.
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(parameter_rtol=2e-6, parameter_atol=1e-6, state=2e-6, torque=1e-6),
    torch.float32: Tolerance(parameter_rtol=1e-5, parameter_atol=2e-6, state=1e-5, torque=5e-6),
    torch.bfloat16: Tolerance(parameter_rtol=2**-6, parameter_atol=4e-3, state=3e-2, torque=5e-3),
    torch.float16: Tolerance(parameter_rtol=2**-9, parameter_atol=1e-3, state=4e-3, torque=1e-3),
    torch.complex64: Tolerance(parameter_rtol=1e-5, parameter_atol=2e-6, state=1e-5, torque=5e-6),
}


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    """The same values, the memory in reversed order of dimensions: dense, not contiguous."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def strided(tensor: Tensor) -> Tensor:
    """The same values in every second place of a larger buffer: not dense."""
    buffer = torch.full((*tensor.shape, 2), 7.0, dtype=tensor.dtype)
    buffer[..., 0] = tensor
    return buffer[..., 0]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def expanded(tensor: Tensor) -> Tensor:
    """The first row repeated with stride 0, as the gradient of a sum is."""
    return tensor[:1].expand_as(tensor)


def offset_by_one(tensor: Tensor) -> Tensor:
    """The same values one element into a buffer: dense, but its storage does not begin with it, nor is it aligned."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Leaf:
    """One parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: Layout = contiguous
    gradient_layout: Layout = contiguous


@dataclass(frozen=True)
class Group:
    leaves: tuple[Leaf, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)


# --- which gradient at which step ---------------------------------------------------------------------------------
# A pattern maps (step, index of the leaf, noise) to a gradient; `noise` is a fresh standard normal draw, `anchor` one
# that stays the same for the leaf.

Pattern = Callable[[int, int, Tensor, Tensor], Tensor]


def drifting(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """A direction that stays for six steps and then turns round, under noise: torques of both signs."""
    sign = 1.0 if (step // 6 + index) % 2 == 0 else -1.0
    return 0.5 * sign * anchor + 0.3 * noise


def aligned(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    return anchor


def opposed(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """Each gradient against the momentum: larger than all before it, with the sign turned."""
    return anchor * (-1.5) ** min(step, 12)


def signs(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """+1 -1 -1 (or -1 +1 +1) and again: whole numbers, so that an angle of 180 degrees is that in any arithmetic."""
    return anchor.sign() * (1.0 if step % 3 == 0 else -1.0)


def sometimes_zero(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    return drifting(step, index, noise, anchor) * float((step + index) % 3 != 0)


def tiny(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """(1 - beta2) g^2, about 1e-33, is representable in AdamW's second moment, with little room below."""
    return 1e-15 * drifting(step, index, noise, anchor)


def huge(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """AdamW's second moment holds g^2 (about 1e37); the sum over a tensor is beyond float32."""
    return 3e18 * drifting(step, index, noise, anchor)


def uneven(step: int, index: int, noise: Tensor, anchor: Tensor) -> Tensor:
    """Leaves that differ by orders of magnitude, so that a shared angle is dominated by one."""
    return 10.0 ** (index % 4 - 2) * drifting(step, index, noise, anchor)


# --- what is missing, what is broken ------------------------------------------------------------------------------

Selection = Callable[[int, int], bool]


def never(step: int, index: int) -> bool:
    return False


def coming_and_going(step: int, index: int) -> bool:
    """Leaf 0 always, leaf 1 never, the others now and then; none at all in step 4."""
    return step == 4 or index == 1 or (index > 1 and (step + index) % 3 == 0)


def second_leaf_in_two_steps(step: int, index: int) -> bool:
    return index == 1 and step in (3, 7)


def second_leaf_at_first(step: int, index: int) -> bool:
    return index == 1 and step < 2


# --- what moves ---------------------------------------------------------------------------------------------------

Schedule = Callable[[int], dict[str, float]]


def constant(step: int) -> dict[str, float]:
    return {}


def warm_up_and_decay(step: int) -> dict[str, float]:
    """From lr 0, linearly to the whole in 8 steps, then down as a cosine."""
    return {"lr": step / 8 if step < 8 else 0.5 + 0.5 * math.cos(math.pi * (step - 8) / 32)}


def one_cycle(step: int) -> dict[str, float]:
    """As OneCycleLR: beta1 (or momentum) moves against lr. Here beta2 moves too."""
    phase = 0.5 - 0.5 * math.cos(2 * math.pi * step / 24)
    return {"lr": 0.05 + 0.95 * phase, "beta1": 0.95 - 0.1 * phase, "beta2": 0.9 + 0.09 * phase}


ADAM = ("AdaTAMW", "AdaTAM")
SHAPES = (Leaf((7, 5)), Leaf((33,)), Leaf((4, 3, 2, 2)), Leaf(()), Leaf((64, 67)))


@dataclass(frozen=True)
class Case:
    name: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Group, ...] = (Group(SHAPES),)
    pattern: Pattern = drifting
    missing: Selection = never
    broken: Selection = never
    schedule: Schedule = constant
    steps: int = 16
    tensor_lr: bool = False

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.name}"

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for group in self.groups for leaf in group.leaves]

    def tolerance(self, index: int) -> Tolerance:
        """Under scope "model" the coarsest dtype decides, for its rounding is in the shared angle."""
        dtypes = [leaf.dtype for leaf in self.leaves]
        if self.options.get("scope") == "model":
            return max((TOLERANCES[dtype] for dtype in dtypes), key=lambda tolerance: tolerance.torque)
        return TOLERANCES[dtypes[index]]

    def parameters(self) -> list[list[Tensor]]:
        """Fresh parameters, one list a group; the same values at every call."""
        generator = torch.Generator().manual_seed(11)
        return [
            [
                torch.nn.Parameter(leaf.layout(torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)))
                for leaf in group.leaves
            ]
            for group in self.groups
        ]

    def gradients(self) -> Iterator[list[Tensor | None]]:
        """For each step one gradient (or None) a leaf, in its own dtype and layout; the same at every call."""
        generator = torch.Generator().manual_seed(12)
        wide = {torch.complex64: torch.complex128}
        anchors = [
            torch.randn(leaf.shape, generator=generator, dtype=wide.get(leaf.dtype, torch.float64))
            for leaf in self.leaves
        ]
        for step in range(self.steps):
            gradients: list[Tensor | None] = []
            for index, (leaf, anchor) in enumerate(zip(self.leaves, anchors, strict=True)):
                noise = torch.randn(leaf.shape, generator=generator, dtype=anchor.dtype)
                gradient = leaf.gradient_layout(self.pattern(step, index, noise, anchor).to(leaf.dtype))
                if self.broken(step, index):
                    gradient.view(-1)[-1] = math.nan if step % 2 else math.inf
                gradients.append(None if self.missing(step, index) else gradient)
            yield gradients


def apply_schedule(case: Case, step: int, groups: list[dict[str, Any]], initial: list[dict[str, Any]]) -> None:
    """Move lr (times its initial value), betas and momentum of the groups, in place if they are tensors."""
    moved = case.schedule(step)
    for group, first in zip(groups, initial, strict=True):
        if "lr" in moved:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(first["lr"]) * moved["lr"])
            else:
                group["lr"] = float(first["lr"]) * moved["lr"]
        if "beta1" in moved and "momentum" in first:
            group["momentum"] = moved["beta1"]
        elif "beta1" in moved:
            group["betas"] = (moved["beta1"], moved["beta2"])


def both_sizes(optimizer: str) -> tuple[str, str]:
    return ("sgd" if optimizer == "TAM" else "adamw", "paper")


def _core(optimizer: str) -> Iterator[Case]:
    """Scope, step size, where the torque ends, what is missing and what moves: for each optimizer."""
    lr = 2e-2 if optimizer == "TAM" else 1e-2
    for scope in ("tensor", "model"):
        for step_size in both_sizes(optimizer):
            # the paper's recurrence moves 5 to 33 times as far
            base = {"lr": lr / 10 if step_size == "paper" else lr, "scope": scope, "step_size": step_size}
            tag = f"{scope}-{step_size}"
            yield Case(tag, optimizer, base)
            yield Case(f"{tag}-decay", optimizer, {**base, "weight_decay": 0.1})
            yield Case(f"{tag}-torque_steps", optimizer, {**base, "torque_steps": 9})
            yield Case(f"{tag}-missing", optimizer, {**base, "weight_decay": 0.1}, missing=coming_and_going)
            yield Case(f"{tag}-broken", optimizer, base, broken=second_leaf_in_two_steps)
            yield Case(f"{tag}-one_cycle", optimizer, base, schedule=one_cycle)
        base = {"lr": lr, "scope": scope}
        yield Case(f"{scope}-broken-at-first", optimizer, base, broken=second_leaf_at_first)
        yield Case(f"{scope}-aligned", optimizer, base, pattern=aligned)
        yield Case(f"{scope}-opposed", optimizer, base, pattern=opposed)
        yield Case(f"{scope}-sometimes-zero", optimizer, base, pattern=sometimes_zero)
        yield Case(f"{scope}-uneven", optimizer, base, pattern=uneven)
        yield Case(f"{scope}-maximize", optimizer, {**base, "maximize": True, "weight_decay": 0.1})
        yield Case(f"{scope}-warm-up", optimizer, base, schedule=warm_up_and_decay)
        yield Case(f"{scope}-lr-zero", optimizer, {**base, "lr": 0.0}, steps=8)
        yield Case(f"{scope}-tensor-lr", optimizer, base, schedule=warm_up_and_decay, tensor_lr=True)
        yield Case(f"{scope}-gamma-zero", optimizer, {**base, "gamma": 0.0})
        yield Case(f"{scope}-gamma-one", optimizer, {**base, "gamma": 1.0})
        yield Case(f"{scope}-large-damping_eps", optimizer, {**base, "damping_eps": 0.3})
        yield from _layouts(optimizer, base, scope)
        yield from _dtypes(optimizer, base, scope)
        yield from _groups(optimizer, base, scope)
        yield from _one_element(optimizer, base, scope)


def _layouts(optimizer: str, base: dict[str, Any], scope: str) -> Iterator[Case]:
    image = (3, 4, 5, 2)
    layouts = (
        Leaf((6, 5), layout=transposed, gradient_layout=transposed),
        Leaf((6, 5), layout=transposed),
        Leaf((6, 5), gradient_layout=transposed),
        Leaf((6, 5), layout=strided, gradient_layout=strided),
        Leaf((6, 5), layout=strided),
        Leaf((6, 5), gradient_layout=strided),
        Leaf(image, layout=channels_last, gradient_layout=channels_last),
        Leaf(image, layout=channels_last),
        Leaf(image, gradient_layout=channels_last),
        Leaf((9, 31), layout=offset_by_one, gradient_layout=offset_by_one),
        Leaf((6, 5), gradient_layout=expanded),
    )
    yield Case(f"{scope}-layouts", optimizer, {**base, "weight_decay": 0.1}, groups=(Group(layouts),))
    empty = (Leaf((0,)), Leaf((5,)), Leaf((3, 0, 2)), Leaf(()), Leaf((1,)))
    yield Case(f"{scope}-empty", optimizer, base, groups=(Group(empty),))
    yield Case(f"{scope}-only-empty", optimizer, base, groups=(Group((Leaf((0,)),)),), steps=3)
    large = (Leaf((300_007,)), Leaf((3,)), Leaf((513, 129)), Leaf((1, 4099)))
    yield Case(f"{scope}-large", optimizer, base, groups=(Group(large),), steps=8)


def _dtypes(optimizer: str, base: dict[str, Any], scope: str) -> Iterator[Case]:
    def leaves(*dtypes: torch.dtype) -> tuple[Group, ...]:
        return (Group(tuple(Leaf(shape, dtype) for shape in ((40, 9), (65,)) for dtype in dtypes)),)

    tame = {} if optimizer == "TAM" else {"betas": (0.9, 0.99), "eps": 1e-4}
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Case(f"{scope}-{name}", optimizer, {**base, **tame}, groups=leaves(dtype), steps=10)
    mixed = leaves(torch.float32, torch.bfloat16, torch.float64, torch.float16)
    yield Case(f"{scope}-mixed-dtypes", optimizer, {**base, **tame}, groups=mixed, steps=10)
    pair = leaves(torch.complex64, torch.float32)
    yield Case(f"{scope}-complex", optimizer, {**base, "weight_decay": 0.1}, groups=pair)
    yield Case(f"{scope}-complex-maximize", optimizer, {**base, "maximize": True}, groups=pair, steps=8)


def _groups(optimizer: str, base: dict[str, Any], scope: str) -> Iterator[Case]:
    momentum = (
        [{"momentum": 0.5}, {"momentum": 0.0}]
        if optimizer == "TAM"
        else [{"betas": (0.5, 0.9)}, {"betas": (0.0, 0.9)}]
    )
    for step_size in both_sizes(optimizer):
        groups = (
            Group(SHAPES),
            Group((Leaf((8, 8)),), {"lr": 3e-3, "gamma": 0.5, "weight_decay": 0.0}),
            Group((Leaf((5,)), Leaf((6, 2))), {**momentum[0], "weight_decay": 0.3, "damping_eps": 0.1}),
            Group((Leaf((5,)),), {**momentum[1], "gamma": 0.99}),
            Group(()),
        )
        options = {**base, "step_size": step_size, "weight_decay": 0.05}
        yield Case(f"{scope}-groups-{step_size}", optimizer, options, groups=groups)
    differing = (Group(SHAPES), Group((Leaf((8, 8)),), {"maximize": True}), Group((Leaf((5,)),), {"lr": 0.0}))
    yield Case(f"{scope}-groups-maximize", optimizer, base, groups=differing)


def _one_element(optimizer: str, base: dict[str, Any], scope: str) -> Iterator[Case]:
    """The angle is that of two numbers: it opposes, or it does not. Without momentum nothing of before is kept."""
    single = (Group((Leaf((1,)), Leaf(()), Leaf((1, 1)), Leaf((1,), torch.float64))),)
    memoryless = {"momentum": 0.0} if optimizer == "TAM" else {"betas": (0.0, 0.9)}
    yield Case(f"{scope}-one-element", optimizer, {**base, "weight_decay": 0.1}, groups=single)
    yield Case(f"{scope}-one-element-missing", optimizer, base, groups=single, missing=coming_and_going)
    yield Case(f"{scope}-one-element-first-step", optimizer, base, groups=single, steps=1)
    yield Case(f"{scope}-one-element-memoryless", optimizer, {**base, **memoryless, "gamma": 0.5}, groups=single)
    # Opposed with gamma 0 and damping_eps 0: the weight of such a gradient is 0, and of the moment nothing is left.
    bare = {**base, **memoryless, "gamma": 0.0, "damping_eps": 0.0}
    yield Case(f"{scope}-one-element-nothing-kept", optimizer, bare, groups=single, pattern=signs, steps=9)
    yield Case(f"{scope}-one-element-aligned", optimizer, bare, groups=single, pattern=aligned, steps=6)


def _adam_only(optimizer: str) -> Iterator[Case]:
    base = {"lr": 1e-2}
    bare = {"lr": 1e-3, "betas": (0.0, 0.9), "gamma": 0.0, "damping_eps": 0.0}
    yield Case("nothing-kept", optimizer, bare, groups=(Group((Leaf((7, 5)), Leaf((33,)), Leaf((64, 67)))),))
    yield Case("no-second-average", optimizer, {**base, "betas": (0.9, 0.0), "eps": 1e-2})
    yield Case("large-eps", optimizer, {**base, "eps": 0.5})
    for scope in ("tensor", "model"):
        yield Case(f"{scope}-tiny", optimizer, {**base, "scope": scope, "eps": 1e-20}, pattern=tiny)
        yield Case(f"{scope}-huge", optimizer, {**base, "scope": scope}, pattern=huge)


CASES: tuple[Case, ...] = tuple(
    case
    for optimizer in ("AdaTAMW", "AdaTAM", "TAM")
    for case in (*_core(optimizer), *(_adam_only(optimizer) if optimizer in ADAM else ()))
)

# What the constructor is given to choose each backend; TAM has no fused kernel and no capturable form.
BACKENDS: Mapping[str, Mapping[str, bool]] = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "default": {},
    "capturable": {"capturable": True},
    "capturable-single": {"capturable": True, "foreach": False, "fused": False},
}
TAM_BACKENDS: Mapping[str, Mapping[str, bool]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "default": {},
}


def backends_of(optimizer: str) -> Mapping[str, Mapping[str, bool]]:
    return TAM_BACKENDS if optimizer == "TAM" else BACKENDS


def takes_tensor_lr(optimizer: str, backend: str) -> bool:
    """torch's AdamW refuses a tensor lr for foreach without capturable, and so do AdaTAMW and AdaTAM."""
    return backend != "foreach" or optimizer == "TAM"
