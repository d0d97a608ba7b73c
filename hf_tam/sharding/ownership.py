"""What is remembered of the user's parameters: enough to know them again, and no reference to any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Memory(NamedTuple):
    """What a tensor was when it was last looked at; the shape is None before a lazy module has given it one."""

    kind: type[Tensor]
    shape: tuple[int, ...] | None


class OwnedParameters:
    """Parameters by identity: those that the optimizer was handed, and those that attached modules own.

    A strong reference would keep alive the unsharded memory that FSDP2 and ZeRO replace. A weak one forbids
    torch.utils.swap_tensors, by which `model.to()` moves DTensors and quantised parameters (torch 2.13). What is left
    are ids, and a freed tensor leaves its id to the next one: an id counts only while the tensor is of the type, and
    of the shape, that are remembered, and it is forgotten once neither `param_groups` nor a module has it any more.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._memories: dict[int, _Memory] = {}
        self._names: dict[int, str] = {}
        self._order: dict[int, None] = {}
        self._kinds: set[type[Tensor]] = {nn.Parameter}

    def add(self, params: Iterable[Tensor], names: Iterable[str] = ()) -> None:
        """Remember parameters that were handed to the optimizer, in the order in which they were.

        One that is handed over again, because it was taken out of its param group (as for LoRA+), stands last.
        """
        added = list(params)
        for param in added:
            self._order.pop(id(param), None)
            self._order[id(param)] = None
            self._memories[id(param)] = _remember(param)
            self._kinds.add(_kind(param))
        self._names.update({id(param): name for param, name in zip(added, names, strict=False)})

    def learn(self, named: Mapping[str, Tensor]) -> None:
        """Remember the parameters of a module, and what they are called there.

        One that was handed over and is smaller now stays remembered as it was: whoever cut it has not made it whole.
        """
        for name, param in named.items():
            self._names[id(param)] = name
            if not (id(param) in self._order and self.has_shrunk(param)):
                self._memories[id(param)] = _remember(param)

    def settle(self, params: Sequence[Tensor], owned: Iterable[int]) -> None:
        """Remember of what was handed over what stands in `param_groups` now, as it is now.

        Args:
            params: What stands there, in order: the user's parameters, or what FSDP made of them.
            owned: The ids of the attached modules' parameters, which are remembered too.
        """
        owned = set(owned)
        present = owned.union(map(id, params))
        self._memories = {key: memory for key, memory in self._memories.items() if key in present}
        for param in params:
            if id(param) not in owned and not self.knows(param):  # put there by hand: the name may be another's
                self._names.pop(id(param), None)
            if not (is_frozen(param) and self.has_shrunk(param)):  # nobody has yet asked what that is a part of
                self._memories[id(param)] = _remember(param)
        self._names = {key: name for key, name in self._names.items() if key in present}
        self.set_order(params)

    def set_order(self, params: Iterable[Tensor]) -> None:
        """Say that these are the parameters that were handed over, in this order."""
        self._order = dict.fromkeys(map(id, params))

    def in_order(self, tensors: Mapping[int, Tensor]) -> list[Tensor | None]:
        """What was handed to the optimizer, in order, taken from `tensors`; None for what is not there."""
        return [tensors.get(key) for key in self._order]

    def names_in_order(self) -> list[str | None]:
        """The names of what was handed to the optimizer, in order."""
        return [self._names.get(key) for key in self._order]

    def shapes_in_order(self) -> list[tuple[int, ...] | None]:
        """The shapes of what was handed to the optimizer, in order."""
        return [self._memories[key].shape if key in self._memories else None for key in self._order]

    def was_handed(self, param: Tensor) -> bool:
        """Whether the optimizer was handed this tensor, whatever its shape is now."""
        return id(param) in self._order and self.recalls(param)

    def recalls(self, param: Tensor) -> bool:
        """Whether this tensor is remembered, whatever its shape is now."""
        memory = self._memories.get(id(param))
        return memory is not None and memory.kind is _kind(param)

    def knows(self, param: Tensor) -> bool:
        """Whether this tensor is remembered as it is."""
        return self.recalls(param) and self._memories[id(param)].shape in (None, shape_of(param))

    def has_shrunk(self, param: Tensor) -> bool:
        """Whether this tensor has fewer elements than when it was handed over."""
        before, now = self.shape(param), shape_of(param)
        return before is not None and now is not None and prod(now) < prod(before)

    def shape(self, param: Tensor) -> tuple[int, ...] | None:
        """The shape that is remembered of a tensor; None where nothing is."""
        return self._memories[id(param)].shape if self.recalls(param) else None

    def has_kind(self, param: Tensor) -> bool:
        """Whether a tensor is of a kind that users hand over: a parameter, or whatever this optimizer was handed."""
        return isinstance(param, nn.Parameter) or type(param) in self._kinds

    def name(self, param: Tensor) -> str | None:
        """The parameter's name, None where unknown."""
        return self._names.get(id(param)) if self.recalls(param) else None


def is_frozen(param: Tensor) -> bool:
    """Whether nothing will step a parameter: then it may be a part, or packed, as bitsandbytes leaves weights."""
    return not param.requires_grad and param.grad is None


def shape_of(param: Tensor) -> tuple[int, ...] | None:
    """The shape of the parameter as the model defines it; None before a lazy module has given it one.

    Under ZeRO-3 the parameter itself is empty between uses.
    """
    if isinstance(param, nn.UninitializedParameter):
        return None
    return tuple(getattr(param, "ds_shape", param.shape))


def device_of(params: Iterable[Tensor]) -> torch.device:
    """Where the first of the tensors lies that has values: what is frozen may be on the meta device."""
    return next((param.device for param in params if param.device.type != "meta"), torch.device("cpu"))


def kind_of(param: Tensor) -> str:
    """Shape and dtype, to be told to other ranks."""
    return f"{shape_of(param)} {param.dtype}"


def _kind(param: Tensor) -> type[Tensor]:
    """The type, for a lazy parameter the one that it will have."""
    return getattr(param, "cls_to_become", type(param))


def _remember(param: Tensor) -> _Memory:
    return _Memory(_kind(param), shape_of(param))
