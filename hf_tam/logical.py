"""The logical tensors of an optimizer: which they are, what they are called, and what makes their sums whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_tam.ownership import OwnedParameters
from hf_tam.sharding import Reducer, is_partitioned, select_reducer

_WRAPPER_PARTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP1, activation checkpointing and torch.compile put into the names of parameters."""


class _Selected(NamedTuple):
    """A reducer, and the tensors of param_groups that it was made for."""

    reducer: Reducer
    params: list[weakref.ref[Tensor]]

    def serves(self, params: Sequence[Tensor]) -> bool:
        return len(params) == len(self.params) and all(
            reference() is param for reference, param in zip(self.params, params, strict=True)
        )


class LogicalTensors:
    """Follows what wrappers do to an optimizer's parameters.

    Usually each parameter in `param_groups` stands for one logical tensor. Under DeepSpeed ZeRO the parameters that
    the optimizer was built with do, and `param_groups` hold flat buffers; DeepSpeed steps one buffer at a time, so
    there is a reducer for each set of tensors that has been stepped.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._owned = OwnedParameters()
        self._module: weakref.ref[nn.Module] | None = None
        self._selected: dict[tuple[int, ...], _Selected] = {}

    def add_group(self, group: dict[str, Any]) -> None:
        """Remember the parameters of a param group, and their names where it has them."""
        self._owned.add(group["params"], group.get("param_names", ()))

    def attach(self, module: nn.Module, params: Sequence[Tensor]) -> None:
        """See `TorqueAware.attach`; `params` are those in `param_groups`."""
        named = _named_parameters(module)
        mine = {id(param) for param in (*params, *self._owned.in_order())}
        if not any(id(param) in mine for param in named.values()):
            raise ValueError(
                f"attach: {type(module).__name__} owns none of this optimizer's parameters; pass the module whose "
                "parameters the optimizer was built with"
            )
        self._owned.add_named(named)
        if self._module is None or self._module() is not module:
            self._module = weakref.ref(module)
            if not is_partitioned(self._owned.in_order()):  # selecting anew communicates under ZeRO, here alone
                self._selected.clear()

    def select(self, params: list[Tensor], groups: Sequence[dict[str, Any]]) -> Reducer:
        """The reducer for `params`, all that stand in `groups`; found anew when they are others than before."""
        key = tuple(map(id, params))
        known = self._selected.get(key)
        if known is not None and known.serves(params):
            return known.reducer
        module = None if self._module is None else self._module()
        if module is not None:  # FSDP2 puts other parameters in the module's place
            self._owned.add_named(_named_parameters(module))
        reducer = select_reducer(params, self._owned, names=self.names(groups), module=module)
        if not self.is_partitioned(groups):
            self._selected.clear()
        self._selected[key] = _Selected(reducer, [weakref.ref(param) for param in params])
        return reducer

    def names(self, groups: Sequence[dict[str, Any]]) -> list[str | None]:
        """The names of the logical tensors, in order; None where unknown."""
        if self.is_partitioned(groups):
            return [None if param is None else self._owned.name(param) for param in self._owned.in_order()]
        names: list[str | None] = []
        for group in groups:
            given = group.get("param_names", [])
            if len(given) != len(group["params"]):  # a wrapper replaced the parameters
                given = [None] * len(group["params"])
            names += [name or self._owned.name(param) for name, param in zip(given, group["params"], strict=True)]
        return names

    def buffers(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Every flat buffer that has been stepped, with the positions of its logical tensors."""
        for selected in self._selected.values():
            for reference in selected.params:
                buffer = reference()
                spans = None if buffer is None else selected.reducer.spans(buffer)
                if buffer is not None and spans is not None:
                    yield buffer, [span.position for span in spans]

    def is_partitioned(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether DeepSpeed ZeRO has taken the parameters over, and put its buffers into `groups` in their place."""
        return is_partitioned(self._owned.in_order()) and not any(
            param in self._owned for group in groups for param in group["params"]
        )


def _named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by the names that the user's own model gives them, whatever is wrapped around it."""
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS): param
        for name, param in inner.named_parameters()
    }
