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

    def add(self, params: Iterable[Tensor]) -> None:
        """Remember parameters."""
        for param in params:
            self._references[id(param)] = weakref.ref(param)

    def add_named(self, named: Mapping[str, Tensor]) -> None:
        """Remember parameters and their names."""
        self.add(named.values())
        self._names.update({id(param): name for name, param in named.items()})

    def __contains__(self, param: object) -> bool:
        """Whether this very tensor was added; an id that a freed tensor left to another does not count."""
        reference = self._references.get(id(param))
        return reference is not None and reference() is param

    def name(self, param: Tensor) -> str | None:
        """The parameter's name, None where unknown."""
        return self._names.get(id(param)) if param in self else None
