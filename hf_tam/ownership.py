"""Which parameters the user handed over, and what they are called; held weakly, so that a wrapper can free them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor


class OwnedParameters:
    """Parameters by identity. Strong references would keep alive the unsharded memory that FSDP2 and ZeRO replace."""

    def __init__(self) -> None:
        """Start empty."""
        self._references: dict[int, weakref.ref[Tensor]] = {}
        self._names: dict[int, str] = {}
        self._in_order: list[weakref.ref[Tensor]] = []

    def add(self, params: Iterable[Tensor], names: Iterable[str] = ()) -> None:
        """Remember parameters that were handed to the optimizer, in the order in which they were.

        One that is handed over again, because it was taken out of its param group (as for LoRA+), stands last.
        """
        added = list(params)
        self._remember(added)
        again = {id(param) for param in added}
        self._in_order = [reference for reference in self._in_order if id(reference()) not in again]
        self._in_order += [self._references[id(param)] for param in added]
        self._names.update({id(param): name for param, name in zip(added, names, strict=False)})

    def add_named(self, named: Mapping[str, Tensor]) -> None:
        """Remember the parameters of a module, and what they are called there."""
        self._remember(named.values())
        self._names.update({id(param): name for name, param in named.items()})

    def in_order(self) -> list[Tensor | None]:
        """What was handed to the optimizer, in order; None for what has been freed since."""
        return [reference() for reference in self._in_order]

    def __contains__(self, param: object) -> bool:
        """Whether this very tensor was added; an id that a freed tensor left to another does not count."""
        reference = self._references.get(id(param))
        return reference is not None and reference() is param

    def name(self, param: Tensor) -> str | None:
        """The parameter's name, None where unknown."""
        return self._names.get(id(param)) if param in self else None

    def _remember(self, params: Iterable[Tensor]) -> None:
        self._references.update({id(param): weakref.ref(param) for param in params})
