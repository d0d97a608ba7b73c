"""The tensors of a step, gathered from the param groups into batches that are stepped together.

Param groups that differ in numbers only make one batch: layer-wise learning rates cost no more than one group. No
tensor is remembered from step to step; see `hf_tam.backends.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_tam.backends import Tensors, select_backend
from hf_tam.backends.tensors import Memory, look
from hf_tam.family import Family
from hf_tam.sharding import LocalReducer, Reducer, Span
from hf_tam.step import buffers
from hf_tam.step.batch import Batch, Options
from hf_tam.step.scalars import pack
from hf_tam.update import Numbers

_LAYOUT, _DEVICE, _DTYPE = attrgetter("layout"), attrgetter("device"), attrgetter("dtype")


class Gatherer:
    """Makes the batches of a step, and remembers where their tensors lie."""

    def __init__(self, family: Family) -> None:
        """Know nothing yet.

        Args:
            family: Whose step it is.
        """
        self._family = family
        self._known: dict[Options, tuple[Memory, list[int] | None]] = {}
        self._captured: list[Any] = []

    def batches(
        self,
        param_groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
        reducer: Reducer,
        *,
        name: Callable[[int], str],
    ) -> list[Batch]:
        """The tensors that have a gradient; creates their states.

        Args:
            param_groups: The optimizer's.
            states: `optimizer.state`.
            reducer: Says what this rank holds of each parameter.
            name: The name of the logical tensor at a position, for errors.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter is on the meta device.
            ValueError: A state or a gradient does not belong to its parameter, see `look`.
        """
        found: dict[Options, _Gathered] = {}
        index = 0
        for group in param_groups:
            self._gather(found, group, states, reducer, first_index=index, name=name)
            index += len(group["params"])
        known, batches = {}, []
        for options, gathered in found.items():
            before = self._known.get(options, (None, None))
            batch, known[options] = self._batch(options, gathered, *before, name=name)
            batches.append(batch)
        self._known = known
        return batches

    def _gather(
        self,
        found: dict[Options, _Gathered],
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        reducer: Reducer,
        *,
        first_index: int,
        name: Callable[[int], str],
    ) -> None:
        """Add the tensors of a param group to those that are `found`."""
        gradient = reducer.gradient
        grads = [None if param is None else gradient(param) for param in group["params"]]
        present = [grad for grad in grads if grad is not None]
        if not present:
            return
        owners, places = list(group["params"]), list(range(len(grads)))
        if len(present) < len(grads):
            places = [place for place, grad in enumerate(grads) if grad is not None]
            owners = [owners[place] for place in places]
        if set(map(_LAYOUT, present)) != {torch.strided}:
            raise RuntimeError(
                f"{self._family.name} does not support sparse gradients, please consider SparseAdam instead"
            )
        for device, held in _by_device(_Held(owners, present, places)):
            first = held.owners[0]
            if device.type == "meta":
                _refuse_meta(name(first_index + held.places[0]), first)
            options = _options(group, device, first)
            if options not in found:
                found[options] = _Gathered(self._family, on_host=options.on_host)
            found[options].add(held, group, states, reducer, first_index=first_index)

    def _batch(
        self,
        options: Options,
        gathered: _Gathered,
        memory: Memory | None,
        addresses: list[int] | None,
        *,
        name: Callable[[int], str],
    ) -> tuple[Batch, tuple[Memory, list[int] | None]]:
        """The batch, and what is to be remembered of it; `memory` and `addresses` are what was the last time."""
        lists = [gathered.params, gathered.grads, *gathered.moments]
        if any(dtype.is_complex for dtype in {*map(_DTYPE, gathered.params), *map(_DTYPE, gathered.grads)}):
            lists = [_real(tensors) for tensors in (gathered.params, _resolved(gathered.grads), *gathered.moments)]
        params, grads, firsts, seconds = lists if len(lists) == 4 else [*lists, []]
        indices, keys = gathered.indices, self._family.scalar_states
        memory, fits = look(
            params, grads, firsts, seconds, known=memory, name=lambda at: name(indices[at])
        )  # fmt: skip
        packed = pack(
            gathered.states, gathered.scalars, keys=keys, shapes=gathered.shapes, device=options.device,
            known=addresses,
        )  # fmt: skip
        tensors = Tensors(
            params, grads, firsts, seconds, gathered.numbers, gathered.groups, options.maximize, memory, fits,
            self._captured,
        )  # fmt: skip
        backend = select_backend(
            options.device,
            foreach=False if options.is_fake else options.foreach,
            fused=False if options.is_fake else options.fused,
            on_host=options.on_host,
        )
        batch = Batch(options, tensors, indices, gathered.present, backend, packed, keys)
        return batch, (memory, packed.addresses)


def _refuse_meta(name: str, param: Tensor) -> None:
    raise RuntimeError(
        f"parameter {name} (shape {tuple(param.shape)}) is on the meta device and has no values to update; "
        "materialise the model (module.to_empty, or load its weights) before training"
    )


def _options(group: Mapping[str, Any], device: torch.device, param: Tensor) -> Options:
    return Options(
        device, group["scope"], group["nonfinite"], group["maximize"], group["foreach"], group["fused"],
        group["capturable"], _is_fake(param),
    )  # fmt: skip


def _is_fake(param: Tensor) -> bool:
    """Whether the tensor has a shape and no values (FakeTensorMode, by which memory is estimated)."""
    if type(param) is torch.nn.Parameter or type(param) is Tensor:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(param, FakeTensor)


def _resolved(grads: list[Tensor]) -> list[Tensor]:
    """Gradients that are conjugated when they are read have no real view."""
    return [grad.resolve_conj() for grad in grads]


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(each) if each.is_complex() else each for each in tensors]


def rounds(param_groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The param groups, and once more what stands in one of them repeatedly: torch.optim steps it as often.

    What does not belong to a round is None in its place.
    """
    left = [list(enumerate(group["params"])) for group in param_groups]
    found = []
    while any(left):
        round_, later = [], []
        for group, params in zip(param_groups, left, strict=True):
            first = dict(reversed([(id(param), place) for place, param in params]))
            chosen = set(first.values())
            kept = [param if place in chosen else None for place, param in enumerate(group["params"])]
            round_.append({**group, "params": kept})
            later.append([(place, param) for place, param in params if place not in chosen])
        found.append(round_)
        left = later
    return found


class _Held(NamedTuple):
    """What stands in one param group, on one device, and has a gradient: it, the gradient, its place in the group."""

    owners: list[Tensor]
    grads: list[Tensor]
    places: list[int]


def _by_device(held: _Held) -> list[tuple[torch.device, _Held]]:
    devices = list(map(_DEVICE, held.owners))
    kinds = list(dict.fromkeys(devices))
    if len(kinds) == 1:
        return [(kinds[0], held)]
    found = []
    for device in kinds:
        chosen = [at for at, other in enumerate(devices) if other == device]
        owners, grads = [held.owners[at] for at in chosen], [held.grads[at] for at in chosen]
        found.append((device, _Held(owners, grads, [held.places[at] for at in chosen])))
    return found


class _Gathered:
    """The lists of a batch, as they grow; see `Tensors` and `Batch`.

    Attributes:
        states: `optimizer.state` of each owner.
        scalars: For each scalar state what stands there.
        shapes: For each owner the shape of a scalar state.
        present: For each tensor whether this rank has a gradient of it; nothing where all are whole.
    """

    def __init__(self, family: Family, *, on_host: bool) -> None:
        self.family, self.on_host = family, on_host
        self.indices: list[int] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.moments: list[list[Tensor]] = [[] for _ in family.moments]
        self.present: list[bool] = []
        self.states: list[dict[str, Any]] = []
        self.scalars: list[list[Any]] = [[] for _ in family.scalar_states]
        self.shapes: list[tuple[int, ...]] = []
        self.numbers: list[Numbers] = []
        self.groups: list[int] = []

    def add(
        self,
        held: _Held,
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        reducer: Reducer,
        *,
        first_index: int,
    ) -> None:
        """Add the tensors of a param group; creates their states."""
        owners, mine = held.owners, list(map(states.__getitem__, held.owners))
        indices = [first_index + place for place in held.places]
        if isinstance(reducer, LocalReducer):
            moments = self._add_states(mine, owners, group, [()] * len(owners))
            self._extend(indices, owners, held.grads, moments, group)
            return
        spans = [reducer.spans(owner) for owner in owners]
        for state, owner, parts in zip(mine, owners, spans, strict=True):
            if parts is not None and state:
                buffers.load_vectors(
                    state, group, parts, defaults=self.family.foreign_scalars(group), device=owner.device
                )
        moments = self._add_states(mine, owners, group, [() if parts is None else (len(parts),) for parts in spans])
        lists = [[reducer.local(tensor) for tensor in column] for column in (owners, *moments)]
        lists.insert(1, held.grads)
        for index, parts, owner, *tensors in zip(indices, spans, owners, *lists, strict=True):
            pieces = [[tensor] for tensor in tensors] if parts is None else [_split(each, parts) for each in tensors]
            positions = [index] if parts is None else [part.position for part in parts]
            self._extend(positions, pieces[0], pieces[1], pieces[2:], group)
            self.present += [owner.grad is not None] * len(positions)

    def _add_states(
        self, mine: list[dict[str, Any]], owners: list[Tensor], group: dict[str, Any], shapes: list[tuple[int, ...]]
    ) -> list[list[Tensor]]:
        """Take note of the scalar states, and return the moments."""
        columns = _columns(mine, self.family.keys)
        if columns is None:
            for state, owner, shape in zip(mine, owners, shapes, strict=True):
                self.family.complete(state, owner, group, shape=shape)
            columns = _columns(mine, self.family.keys)
            assert columns is not None
        self.states += mine
        self.shapes += shapes
        count = len(self.moments)
        for held, column in zip(self.scalars, columns[count:], strict=True):
            held += column
        return columns[:count]

    def _extend(
        self,
        indices: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        group: dict[str, Any],
    ) -> None:
        self.indices += indices
        self.params += params
        self.grads += grads
        for held, column in zip(self.moments, moments, strict=True):
            held += column
        self.groups += [self._number_of(group)] * len(indices)

    def _number_of(self, group: Mapping[str, Any]) -> int:
        """The place of the group's hyperparameters in `numbers`."""
        numbers = self.family.numbers(group)
        if self.on_host and isinstance(numbers.lr, Tensor):
            numbers = numbers._replace(lr=float(numbers.lr))
        if not self.numbers or not _are_same(numbers, self.numbers[-1]):
            self.numbers.append(numbers)
        return len(self.numbers) - 1


def _are_same(left: Numbers, right: Numbers) -> bool:
    if isinstance(left.lr, Tensor) or isinstance(right.lr, Tensor):
        return left.lr is right.lr and left[1:] == right[1:]
    return left == right


def _columns(states: list[dict[str, Any]], keys: Sequence[str]) -> list[list[Any]] | None:
    """What stands under each of `keys`, an entry a state; None where something is missing."""
    try:
        columns = [list(map(itemgetter(key), states)) for key in keys]
    except KeyError:
        return None
    return None if any(NoneType in set(map(type, column)) for column in columns) else columns


def _split(buffer: Tensor, parts: Sequence[Span]) -> list[Tensor]:
    """The logical tensors in a flat buffer."""
    return [buffer.narrow(0, part.start, part.length) for part in parts]
