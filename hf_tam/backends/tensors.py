"""What a backend is handed: the tensors of a step side by side, and what is known of where they lie.

Kernels walk raw pointers, so everything that a pointer cannot say is looked at before one is taken, here and
nowhere else: kind, shape, strides, dtype and device of parameter, gradient and moments. It is looked at anew in every
step, for anybody may have put another tensor in the place of one (`resize_token_embeddings`, pruning, offloading),
under the same name, the same object or the same address. Nothing is remembered but numbers: a reference would keep
memory alive that its owner has given up, and a weak one keeps torch from swapping a parameter
(torch.utils.swap_tensors, by which `module.to` moves DTensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_tam.integrations.torch_private import has_no_memory, is_written_outside_inference_mode
from hf_tam.precision import joined
from hf_tam.update import Numbers

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


Dtypes = tuple[torch.dtype, torch.dtype]
"""Of a parameter, and of its moments."""


@dataclass(slots=True)
class Tensors:
    """n logical tensors on one device that have a gradient in this step. Complex ones appear as their real view.

    Attributes:
        params: Their values, which can be written.
        grads: The gradients as the backward pass left them.
        firsts: The first moments (`exp_avg` or `momentum_buffer`).
        seconds: The second moments; empty for TAM.
        corrections: What the parameters leave out of the weights, see `hf_tam.precision`; empty without.
        numbers: The hyperparameters of each param group they come from.
        groups: The place in `numbers` of each tensor.
        maximize: Whether the sign of the gradients is turned.
        moment_dtype: What the moments are kept in; None: as the parameter.
        memory: What is known of where parameters and moments lie.
        fits: For each gradient whether it is a plain tensor that lies as its parameter does; None where all do.
        captured: What CUDA graphs go on reading; lives as long as the optimizer.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    firsts: list[Tensor] = field(default_factory=list)
    seconds: list[Tensor] = field(default_factory=list)
    corrections: list[Tensor] = field(default_factory=list)
    numbers: list[Numbers] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    maximize: bool = False
    moment_dtype: torch.dtype | None = None
    memory: Memory = field(init=False)
    fits: list[bool] | None = None
    captured: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        """How many."""
        return len(self.params)

    def coupled_decay(self, at: int) -> float:
        """The weight decay that belongs to the gradient at a place; 0 for AdaTAMW."""
        return float(self.numbers[self.groups[at]].coupled_decay)

    def has_raw_grad(self, at: int) -> bool:
        """Whether the angle and the moments see that gradient as it is."""
        return not self.maximize and self.coupled_decay(at) == 0.0

    def grad(self, at: int) -> Tensor:
        """The gradient that the angle and the moments see: sign turned, coupled decay added. A temporary if so."""
        raw, decay = self.grads[at], float(self.numbers[self.groups[at]].coupled_decay)
        if decay == 0.0 and not self.maximize:
            return raw
        grad = raw.neg() if self.maximize else raw
        return grad.add(self.weights(at), alpha=decay) if decay else grad  # 0 * Inf would be NaN

    def weights(self, at: int) -> Tensor:
        """The weights at a place, fp32 where a correction belongs to them."""
        return joined(self.params[at], self.corrections[at]) if self.corrections else self.params[at]

    def only(self, places: Sequence[int]) -> Tensors:
        """Some of them."""
        held = (self.params, self.grads, self.firsts, self.seconds, self.corrections)
        params, grads, firsts, seconds, corrections = ([each[at] for at in places] if each else [] for each in held)
        chosen = Tensors(
            params, grads, firsts, seconds, corrections, self.numbers, [self.groups[at] for at in places],
            self.maximize, self.moment_dtype, captured=self.captured,
        )  # fmt: skip
        chosen.memory, chosen.fits = look(chosen, known=None, name=str)
        return chosen

    def as_real(self) -> None:
        """Let complex tensors appear as their real view; a gradient that is conjugated when it is read is a copy."""
        self.grads = [grad.resolve_conj() for grad in self.grads]
        for held in (self.params, self.grads, self.firsts, self.seconds):  # no correction is complex
            held[:] = [torch.view_as_real(each) if each.is_complex() else each for each in held]

    def walkable(self, dtypes: Container[Dtypes]) -> Sequence[int] | None:
        """The places of what a kernel for `dtypes` can walk, gradient included; None where that is all."""
        memory, fits = self.memory, self.fits
        if memory.is_walkable_throughout and fits is None and all(each in dtypes for each in memory.dtypes):
            return None
        return [
            at
            for at, (param, first) in enumerate(zip(self.params, self.firsts, strict=True))
            if memory.walkable[at] and (fits is None or fits[at]) and (param.dtype, first.dtype) in dtypes
        ]


class _Lie(NamedTuple):
    """How tensors lie in memory, an entry each, and whether all are contiguous.

    What is not a plain tensor has no address, and strides of its own.
    """

    shapes: list[torch.Size]
    strides: list[Any]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    is_contiguous: bool

    def is_that_of(self, tensors: Sequence[Tensor], *, devices: bool = True) -> bool:
        """Whether the tensors lie like this. One at a time: the many small tuples cost more to keep than to make.

        Args:
            tensors: The tensors.
            devices: Whether the devices are looked at, too.
        """
        # Not the strides alone, which (500, 64) and (508, 64) have in common: after `resize_token_embeddings` a kernel
        # would write past the end of the moments.
        if len(tensors) != len(self.shapes) or not all(map(eq, map(Tensor.size, tensors), self.shapes)):
            return False
        if not self.is_contiguous or not all(map(Tensor.is_contiguous, tensors)):  # the strides follow from the shape
            if not all(map(eq, map(Tensor.stride, tensors), self.strides)):
                return False
        if not all(map(is_, map(_DTYPE, tensors), self.dtypes)):
            return False
        return not devices or all(map(eq, map(_DEVICE, tensors), self.devices))


class _Signature(NamedTuple):
    """All that is known of parameters and moments; two that are equal lead a kernel to the same memory."""

    param_addresses: list[int]
    first_addresses: list[int]
    second_addresses: list[int]
    correction_addresses: list[int]
    params: _Lie
    firsts: _Lie
    seconds: _Lie | None
    corrections: _Lie | None

    @classmethod
    def of(cls, tensors: Tensors) -> _Signature:
        """What there is to be seen of them."""
        seconds, corrections = tensors.seconds, tensors.corrections
        return cls(
            _addresses(tensors.params), _addresses(tensors.firsts), _addresses(seconds), _addresses(corrections),
            _lie(tensors.params), _lie(tensors.firsts), _lie(seconds) if seconds else None,
            _lie(corrections) if corrections else None,
        )  # fmt: skip

    def is_that_of(self, tensors: Tensors) -> bool:
        """Whether nothing of it is another."""
        seconds, corrections = tensors.seconds, tensors.corrections
        before = (self.param_addresses, self.first_addresses, self.second_addresses, self.correction_addresses)
        if before != (
            _addresses(tensors.params), _addresses(tensors.firsts), _addresses(seconds), _addresses(corrections)
        ):  # fmt: skip
            return False
        devices = any(0 in addresses for addresses in before)  # every other address belongs to one device
        return (
            self.params.is_that_of(tensors.params, devices=devices)
            and self.firsts.is_that_of(tensors.firsts, devices=devices)
            and (self.seconds.is_that_of(seconds, devices=devices) if self.seconds else not seconds)
            and (self.corrections.is_that_of(corrections, devices=devices) if self.corrections else not corrections)
        )


@dataclass(slots=True)
class Memory:
    """Where parameters and moments lie, valid for as long as `signature` is that of the tensors.

    Attributes:
        signature: What it was found out from.
        walkable: For each tensor whether parameter, moments and correction are plain tensors of one layout that fills
            a stretch of memory that is no other tensor's, which a kernel can walk from its address; the moments have
            one dtype.
        is_walkable_throughout: Whether all are.
        dtypes: Those of the parameters and moments.
        kept: What backends have worked out from it, each under its name; numbers only.
    """

    signature: _Signature
    walkable: list[bool]
    is_walkable_throughout: bool
    dtypes: set[Dtypes]
    kept: dict[str, Any] = field(default_factory=dict)


def look(tensors: Tensors, *, known: Memory | None, name: Callable[[int], str]) -> tuple[Memory, list[bool] | None]:
    """Look where the tensors lie, and that they belong together.

    Args:
        tensors: Without what is looked for. Gradients that are zeros without memory are replaced in their list.
        known: What was found the last time; returned if it still holds.
        name: The name of the parameter at a place.

    Returns:
        What is known of parameters and moments, and `Tensors.fits`.

    Raises:
        ValueError: A gradient or a state has another shape than its parameter, or lies on another device; or a moment
            has the dtype neither of its parameter nor of the gradient nor the one asked for; or the memory of one was
            freed.
        RuntimeError: A parameter was made in inference mode, and this is outside of it.
    """
    params, grads = tensors.params, tensors.grads
    is_known = known is not None and known.signature.is_that_of(tensors)
    signature = known.signature if known is not None and is_known else _Signature.of(tensors)
    addresses = _addresses(grads)
    if 0 in addresses:
        _require_memory(grads, addresses, "gradient", name)
    fit_all = signature.params.is_that_of(grads)
    moments = [held for held in (signature.firsts, signature.seconds) if held is not None]
    usual = signature.params.dtypes if tensors.moment_dtype is None else [tensors.moment_dtype] * len(params)
    if not is_known or not fit_all or any(held.dtypes != usual for held in moments):
        _require_memory(params, signature.param_addresses, "values", name)
        _require_memory(tensors.firsts, signature.first_addresses, "first moment", name)
        _require_memory(tensors.seconds, signature.second_addresses, "second moment", name)
        _require_memory(tensors.corrections, signature.correction_addresses, "correction", name)
        for at in range(len(params)):
            _require_together(tensors, at, name)
    fits = None
    if not fit_all or not _are_plain(grads) or any(map(Tensor.is_neg, grads)):
        pairs = zip(_rows(_lie(grads)), _rows(signature.params), grads, strict=True)
        fits = [left == right and _is_plain(grad) and not grad.is_neg() for left, right, grad in pairs]
    if is_known:
        assert known is not None
        return known, fits
    columns = [held for held in (params, tensors.firsts, tensors.seconds, tensors.corrections) if held]
    lies = [held for held in (signature.params, *moments, signature.corrections) if held is not None]
    together = zip(*columns, strict=True)
    walkable = [
        _are_plain(held)
        and all(row == rows[0] for row in rows)
        and len({moment.dtypes[at] for moment in moments}) == 1
        and is_dense(held[0])
        and not any(map(Tensor.is_neg, held))
        for at, (rows, held) in enumerate(zip(zip(*map(_places, lies), strict=True), together, strict=True))
    ]
    for at in _entangled(signature, walkable):
        walkable[at] = False
    dtypes = set(zip(signature.params.dtypes, signature.firsts.dtypes, strict=True))
    return Memory(signature, walkable, all(walkable), dtypes), fits


def _entangled(signature: _Signature, walkable: Sequence[bool]) -> set[int]:
    """Which of the walkable tensors share memory with another (tied by `.data`): two threads must not take both."""
    columns = [
        (signature.param_addresses, signature.params), (signature.first_addresses, signature.firsts),
        (signature.second_addresses, signature.seconds), (signature.correction_addresses, signature.corrections),
    ]  # fmt: skip
    stretches = sorted(
        (address, address + math.prod(shape) * dtype.itemsize, at)
        for addresses, lie in columns
        if lie is not None
        for at, (address, shape, dtype) in enumerate(zip(addresses, lie.shapes, lie.dtypes, strict=True))
        if walkable[at]
    )
    found, furthest, owner = set(), 0, 0
    for begin, end, at in stretches:
        if begin < min(furthest, end):
            found |= {at, owner}
        if end > furthest:
            furthest, owner = end, at
    return found


def _rows(lie: _Lie) -> list[tuple[Any, ...]]:
    return list(zip(lie.shapes, lie.strides, lie.dtypes, lie.devices, strict=True))


def _places(lie: _Lie) -> list[tuple[Any, ...]]:
    """How each lies, its dtype left out."""
    return list(zip(lie.shapes, lie.strides, lie.devices, strict=True))


def _is_plain(tensor: Tensor) -> bool:
    # The very types: what is behind the address of a subclass (DTensor, a quantised weight) need not be its values.
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= {Tensor, nn.Parameter}


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    if _are_plain(tensors):
        return list(map(Tensor.data_ptr, tensors))
    return [tensor.data_ptr() if _is_plain(tensor) else 0 for tensor in tensors]


def _lie(tensors: Sequence[Tensor]) -> _Lie:
    return _Lie(
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(_DTYPE, tensors)),
        list(map(_DEVICE, tensors)),
        all(map(Tensor.is_contiguous, tensors)),
    )


def _require_memory(tensors: list[Tensor], addresses: Sequence[int], what: str, name: Callable[[int], str]) -> None:
    """Refuse plain tensors whose storage was freed; gradients that are zeros without memory are given some."""
    if 0 not in addresses:
        return
    for at, (tensor, address) in enumerate(zip(tensors, addresses, strict=True)):
        if address or tensor.is_meta or not tensor.numel() or not _is_plain(tensor):
            continue
        if what != "gradient" or not has_no_memory(tensor):  # others are to be written to
            raise ValueError(
                f"the {what} of parameter {name(at)} (shape {tuple(tensor.shape)}) has no memory: its storage was "
                "freed (`untyped_storage().resize_(0)`), or never there. Nothing was changed; give it some"
            )
        tensors[at] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _require_together(tensors: Tensors, at: int, name: Callable[[int], str]) -> None:
    param, grad = tensors.params[at], tensors.grads[at]
    moments = [tensors.firsts[at], *tensors.seconds[at : at + 1]]
    corrections = tensors.corrections[at : at + 1]
    states = [("moment", moment) for moment in moments] + [("correction", each) for each in corrections]
    if param.is_inference() and not is_written_outside_inference_mode(param) and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"Inplace update to inference tensor outside InferenceMode is not allowed: parameter {name(at)} (shape "
            f"{tuple(param.shape)}) was made in torch.inference_mode(); build the model outside of it"
        )
    for what, tensor in [("gradient", grad), *((f"{what} in optimizer.state", state) for what, state in states)]:
        if tensor.shape != param.shape:
            raise ValueError(
                f"parameter {name(at)} has shape {tuple(param.shape)}, and its {what} {tuple(tensor.shape)}: the "
                "parameter was resized or replaced after the optimizer had seen it. Nothing was changed; resize its "
                "states with it, delete them (`del optimizer.state[param]`) to begin anew, or build the optimizer "
                "after the model has its size"
            )
        if tensor.device != param.device:
            raise ValueError(
                f"parameter {name(at)} (shape {tuple(param.shape)}) is on {param.device}, and its {what} (shape "
                f"{tuple(tensor.shape)}) on {tensor.device}. Nothing was changed; move them to one device before the "
                "step"
            )
    # As AdamW takes it: fp32 moments and an fp32 gradient beside a parameter that was made bf16 by `.data`.
    for moment in moments:
        if moment.dtype not in (param.dtype, grad.dtype, tensors.moment_dtype):
            raise ValueError(
                f"parameter {name(at)} (shape {tuple(param.shape)}) is {param.dtype} with a gradient of {grad.dtype}, "
                f"and a moment in optimizer.state (shape {tuple(moment.shape)}) is {moment.dtype}. Nothing was "
                "changed; convert the states with the parameter, or build the optimizer after the model has its dtype"
            )
    for correction in corrections:
        if correction.dtype != param.dtype:
            raise ValueError(
                f"the correction in optimizer.state of parameter {name(at)} (shape {tuple(param.shape)}) is "
                f"{correction.dtype}, and its bits are called torch.bfloat16. Nothing was changed; delete it "
                "(`del optimizer.state[param]['param_correction']`) to begin it anew"
            )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
