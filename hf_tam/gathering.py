"""The tensors of a step, gathered into buckets.

What is known of a tensor from the last step is used again while it stays the same tensor with the same state. Whether
it does is asked of all tensors of a param group at once, attribute by attribute: a step of many small tensors, as LoRA
has, costs as much as the host takes to look at them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_tam import buffers, checkpoint
from hf_tam.backends import Entry, EntryList, select_backend
from hf_tam.bucket import Bucket
from hf_tam.scalars import PackedScalars
from hf_tam.sharding import LocalReducer, Reducer

if TYPE_CHECKING:
    from hf_tam.torque_aware import TorqueAware

__all__ = ["Gatherer"]


class Gatherer:
    """Makes the buckets of a step, and remembers them."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[int, _Known] = {}
        self._packed: dict[tuple[int, torch.device], PackedScalars] = {}

    def buckets(self, optimizer: TorqueAware, reducer: Reducer) -> list[Bucket]:
        """The tensors that have a gradient, one bucket for each param group and device; creates their states.

        Args:
            optimizer: Whose step it is.
            reducer: Says what this rank holds of each parameter.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter is on the meta device.
        """
        if not isinstance(reducer, LocalReducer):  # what was cut in the meantime must not be kept alive whole
            self._known.clear()
        index, buckets = 0, []
        for number, group in enumerate(optimizer.param_groups):
            for device, entries in self._entries(optimizer, reducer, number, first_index=index).items():
                on_host = device.type == "cpu" and not group["capturable"]
                backend = select_backend(device, foreach=group["foreach"], fused=group["fused"], on_host=on_host)
                packed = self._packed[number, device]
                buckets.append(Bucket.of(group, entries, packed=packed, backend=backend, on_host=on_host))
            index += len(group["params"])
        return buckets

    def forget_gradients(self) -> None:
        """Let go of the gradients, which the training loop may want to free before the next forward pass."""
        for known in self._known.values():
            for entry in known.entries:
                entry.raw_grad = _NO_GRADIENT

    def _entries(
        self, optimizer: TorqueAware, reducer: Reducer, number: int, *, first_index: int
    ) -> Mapping[torch.device, EntryList]:
        group = optimizer.param_groups[number]
        grads = [reducer.gradient(param) for param in group["params"]]
        places = [place for place, grad in enumerate(grads) if grad is not None]
        params = [group["params"][place] for place in places]
        found = [grad for grad in grads if grad is not None]
        known = self._known.get(number)
        if known is not None and known.is_current(params, found, first_index, group, optimizer.state):
            known.take(found)
            return known.lists
        lists: defaultdict[torch.device, EntryList] = defaultdict(EntryList)
        for place, param, grad in zip(places, params, found, strict=True):
            lists[param.device] += _new_entries(optimizer, reducer, group, first_index + place, param, grad)
        for device, entries in lists.items():
            self._pack(number, device, entries, optimizer.scalar_states)
        if isinstance(reducer, LocalReducer):
            self._known[number] = _Known(params, lists, first_index, group, optimizer)
        return lists

    def _pack(self, number: int, device: torch.device, entries: Sequence[Entry], keys: Sequence[str]) -> None:
        """Pack the scalar states of a bucket anew where they are not those of its last step."""
        states = list({id(entry.state): entry.state for entry in entries}.values())
        packed = self._packed.get((number, device))
        if packed is None or not packed.holds(states):
            self._packed[number, device] = PackedScalars(states, keys=keys)


_NO_GRADIENT = torch.empty(0)


class _Known:
    """The entries of a param group whose parameters are whole tensors.

    Attributes:
        lists: The entries of each device.
        entries: All of them, in the order of the parameters.
    """

    def __init__(
        self,
        params: list[Tensor],
        lists: Mapping[torch.device, EntryList],
        first_index: int,
        group: Mapping[str, Any],
        optimizer: TorqueAware,
    ) -> None:
        """Remember what was just gathered."""
        self.lists = lists
        self.entries = sorted(chain.from_iterable(lists.values()), key=lambda entry: entry.index)
        self._indices = [entry.index - first_index for entry in self.entries]
        self._params = params
        self._layout = _layout(params)
        keys = (*optimizer.moments, *optimizer.scalar_states)
        self._tensors_of = itemgetter(*keys)
        self._states = list(chain.from_iterable(self._tensors_of(optimizer.state[param]) for param in params))
        # Who moves states by `.data`, to offload them, moves all scalars: the first one tells.
        self._columns = [slice(column, None, len(keys)) for column in range(len(optimizer.moments) + 1)]
        self._addresses = self._where(self._states)
        self._first_index, self._options = first_index, _options(group)
        self._is_complex = any(param.is_complex() for param in params)

    def is_current(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        first_index: int,
        group: Mapping[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
    ) -> bool:
        """Whether the parameters, their states and the group's options still are those of the entries."""
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        if first_index != self._first_index or _options(group) != self._options or _layout(params) != self._layout:
            return False
        if any(grad.is_sparse for grad in grads):
            return False
        try:
            tensors = list(chain.from_iterable(map(self._tensors_of, map(states.__getitem__, params))))
        except KeyError:  # a state was emptied
            return False
        return all(map(is_, tensors, self._states)) and self._where(tensors) == self._addresses

    def _where(self, tensors: list[Tensor]) -> list[list[int]]:
        """Where the moments and the first scalar states lie."""
        return [list(map(Tensor.data_ptr, tensors[column])) for column in self._columns]

    def take(self, grads: Sequence[Tensor]) -> None:
        """Point the entries at these gradients."""
        for entry, grad in zip(self.entries, grads, strict=True):
            entry.raw_grad = grad
        if self._is_complex:
            for entry, grad in zip(self.entries, grads, strict=True):
                entry.raw_grad = torch.view_as_real(grad) if grad.is_complex() else grad


def _options(group: Mapping[str, Any]) -> tuple[float, bool]:
    return group["weight_decay"], group["maximize"]


def _layout(params: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where the parameters are and how they lie there."""
    return (
        list(map(Tensor.data_ptr, params)),
        list(map(Tensor.stride, params)),
        [param.shape for param in params],
        [param.dtype for param in params],
    )


def _new_entries(
    optimizer: TorqueAware, reducer: Reducer, group: dict[str, Any], index: int, param: Tensor, grad: Tensor
) -> list[Entry]:
    """One entry, or one for each logical tensor in a flat buffer; creates the state."""
    if grad.is_sparse:
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients, please consider SparseAdam instead"
        )
    if param.device.type == "meta":
        raise RuntimeError(
            f"parameter {index} (shape {tuple(param.shape)}) is on the meta device and has no values to update; "
            "materialise the model (module.to_empty, or load its weights) before training"
        )
    spans, state = reducer.spans(param), optimizer.state[param]
    if not state:
        optimizer._init_state(param, state, spans)
    elif spans is None:
        checkpoint.fill_in(optimizer, group, param, state)
    entry = Entry.of(
        index,
        param,
        grad,
        state,
        local=reducer.local,
        moments=optimizer.moments,
        decay=group["weight_decay"] if optimizer.coupled else 0.0,
        maximize=group["maximize"],
    )
    if spans is None:
        return [entry]
    defaults = checkpoint.foreign_scalars(optimizer, group)
    buffers.load_vectors(state, group, spans, defaults=defaults, device=param.device)
    return buffers.split(entry, spans)
