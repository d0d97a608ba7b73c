"""The tensors of a step, gathered from the param groups into batches that are stepped together.

Param groups that differ in numbers only make one batch: layer-wise learning rates cost no more than one group. No
tensor is remembered from step to step; see `hf_tam.backends.tensors`.

The scalar states (`step`, `torque`, ...) of a batch are packed into one matrix, of which `optimizer.state` holds
views, so that a step reads and writes the numbers of all tensors with one operation each, on the host and on an
accelerator alike, and whoever looks at the state sees ordinary 0-d tensors. What counts is what stands in
`optimizer.state`. Others move states (`.data`), replace or convert them, or share them with other processes; so the
matrix is not kept, but made in each step of the memory that the states lie in, if they still lie there side by side,
and of their values if they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from hf_tam.backends import Backend, Tensors, select_backend
from hf_tam.backends.tensors import Memory, look
from hf_tam.family import CORRECTION, Family, is_corrected, moment_dtype
from hf_tam.integrations.torch_private import is_fake as is_fake_tensor
from hf_tam.sharding import LocalReducer, Reducer, Span
from hf_tam.step import buffers
from hf_tam.step.batch import Batch, Options
from hf_tam.update import Numbers

# Attributes are read by `map` over whole lists, here and in `hf_tam.backends.tensors`: a step of a thousand small
# tensors costs what Python does for each of them.
_GRAD, _LAYOUT, _DEVICE, _DTYPE = map(attrgetter, ("grad", "layout", "device", "dtype"))
_BYTES = 4  # of a scalar state
_NUMBERS = {float, int}


@dataclass(slots=True)
class _Known:
    """What is remembered of a batch for the next step: numbers, and no tensor."""

    backend: Backend
    memory: Memory
    addresses: list[int] | None


class Gatherer:
    """Makes the batches of a step, and remembers where their tensors lie."""

    def __init__(self, family: Family) -> None:
        """Know nothing yet.

        Args:
            family: Whose step it is.
        """
        self._family, self._keys = family, (*family.moments, *family.scalar_states)
        self._known: dict[Options, _Known] = {}
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
        found: dict[Options, tuple[Batch, list[list[Any]]]] = {}
        index = 0
        for group in param_groups:
            self._gather(found, group, states, reducer, first_index=index, name=name)
            index += len(group["params"])
        known = {options: self._finish(batch, columns, name) for options, (batch, columns) in found.items()}
        self._known = known
        return [batch for batch, _ in found.values()]

    def _gather(
        self,
        found: dict[Options, tuple[Batch, list[list[Any]]]],
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        reducer: Reducer,
        *,
        first_index: int,
        name: Callable[[int], str],
    ) -> None:
        """Add the tensors of a param group to the batches that are `found`, and their scalar states to the columns."""
        gradient = _GRAD if isinstance(reducer, LocalReducer) else reducer.gradient
        params = group["params"]
        grads: list[Any] = [None if param is None else gradient(param) for param in params]
        places = [place for place, grad in enumerate(grads) if grad is not None]
        indices = [first_index + place for place in places]
        if len(places) < len(grads):
            params, grads = [params[place] for place in places], [grads[place] for place in places]
        if places and {*map(_LAYOUT, grads)} != {torch.strided}:
            # The words of torch.optim.Adam (torch/optim/adam.py), which are searched for.
            raise RuntimeError(
                f"{self._family.name} does not support sparse gradients, please consider SparseAdam instead"
            )
        kinds: list[Any] = list(map(_DEVICE, params))
        if group[CORRECTION] is not None or group["state_bits"] is not None:
            kinds = [(param.device, is_corrected(group, param), moment_dtype(group, param)) for param in params]
        for kind in dict.fromkeys(kinds):  # usually one
            lists: list[list[Any]] = [params, grads, indices]
            if len(set(kinds)) > 1:
                here = [at for at, each in enumerate(kinds) if each == kind]
                lists = [[column[at] for at in here] for column in lists]
            device, corrected, dtype = kind if isinstance(kind, tuple) else (kind, False, None)
            first = lists[0][0]
            if device.type == "meta":
                _refuse_meta(name(lists[2][0]), first)
            is_fake = type(first) not in (nn.Parameter, Tensor) and is_fake_tensor(first)
            # A fake tensor has no number that the host could read, whatever device it names.
            options = Options(
                device, group["scope"], group["nonfinite"], bool(group["maximize"]), group["foreach"], group["fused"],
                on_host=device.type == "cpu" and not group["capturable"] and not is_fake, is_fake=is_fake,
                is_corrected=corrected, moment_dtype=dtype,
            )  # fmt: skip
            if options not in found:
                # Batches are made anew in every step; what captured CUDA graphs go on reading must outlive them.
                tensors = Tensors(maximize=options.maximize, moment_dtype=dtype, captured=self._captured)
                found[options] = Batch(options, tensors), [[] for _ in self._family.scalar_states]
            self._add(*found[options], lists[0], lists[1], lists[2], group, states, reducer)

    def _add(
        self,
        batch: Batch,
        columns: list[list[Any]],
        params: list[Tensor],
        grads: list[Tensor],
        indices: list[int],
        group: dict[str, Any],
        states: MutableMapping[Tensor, dict[str, Any]],
        reducer: Reducer,
    ) -> None:
        """Add to a batch what stands in one param group, at the positions `indices`; creates the states."""
        entries, tensors, family = list(map(states.__getitem__, params)), batch.tensors, self._family
        spans = None if isinstance(reducer, LocalReducer) else _spans(reducer, family, params, entries, group)
        shapes = [()] * len(params) if spans is None else [() if each is None else (len(each),) for each in spans]
        keys, num_moments = self._keys, len(family.moments)
        if batch.options.is_corrected:
            keys = (*keys, CORRECTION)
        stored = _columns(entries, keys)
        if stored is None:
            for state, param, shape in zip(entries, params, shapes, strict=True):
                family.complete(state, param, group, shape=shape)
            stored = [list(map(itemgetter(key), entries)) for key in keys]
        scalars, corrections = stored[num_moments : len(self._keys)], stored[len(self._keys) :]
        lists = [params, grads, *stored[:num_moments], *corrections]
        if spans is not None:
            lists, indices, present = _local(reducer, lists, spans, indices)
            batch.present += present
        numbers = family.numbers(group)
        # Tensors and arrays, which torch.optim takes too, are read in every step: schedulers write to them.
        if not {*map(type, numbers)} <= _NUMBERS:
            numbers = _read(numbers, on_host=batch.options.on_host)
        if not tensors.numbers or not _are_same(numbers, tensors.numbers[-1]):
            tensors.numbers.append(numbers)
        tensors.groups += [len(tensors.numbers) - 1] * len(indices)
        batch.indices += indices
        batch.entries += entries
        batch.shapes += shapes
        held = [tensors.params, tensors.grads, tensors.firsts, tensors.seconds][: 2 + num_moments]
        held += [tensors.corrections] * len(corrections)
        for column, new in zip([*held, *columns], [*lists, *scalars], strict=True):
            column += new

    def _finish(self, batch: Batch, columns: list[list[Any]], name: Callable[[int], str]) -> _Known:
        """Look where the tensors lie, pack their scalar states, and choose the backend; say what to remember of it."""
        options, tensors, indices = batch.options, batch.tensors, batch.indices
        known = self._known.get(options)
        if any(dtype.is_complex for dtype in {*map(_DTYPE, tensors.params), *map(_DTYPE, tensors.grads)}):
            tensors.as_real()
        tensors.memory, tensors.fits = look(
            tensors, known=None if known is None else known.memory, name=lambda at: name(indices[at])
        )
        keys = self._family.scalar_states
        batch.matrix, addresses, batch.apart = pack(
            batch.entries, columns, keys=keys, shapes=batch.shapes, device=options.device,
            known=None if known is None else known.addresses,
        )  # fmt: skip
        if known is not None:
            batch.backend = known.backend
        else:
            # What is fake has no address: plain operations are all that can be run on it.
            batch.backend = select_backend(
                options.device,
                foreach=False if options.is_fake else options.foreach,
                fused=False if options.is_fake else options.fused,
                on_host=options.on_host,
            )
        return _Known(batch.backend, tensors.memory, addresses)


def _read(numbers: Numbers, *, on_host: bool) -> Numbers:
    """The same as Python's; the learning rate stays a tensor where the host must not read it.

    The others are read wherever they lie: which kernel is launched depends on some of them.
    """
    lr = numbers.lr if isinstance(numbers.lr, Tensor) and not on_host else float(numbers.lr)
    return Numbers(lr, *map(float, numbers[1:]))


def _are_same(left: Numbers, right: Numbers) -> bool:
    if isinstance(left.lr, Tensor) or isinstance(right.lr, Tensor):
        # By identity: to compare their values would wait for an accelerator.
        return left.lr is right.lr and left[1:] == right[1:]
    return left == right


def _columns(states: list[dict[str, Any]], keys: Sequence[str]) -> list[list[Any]] | None:
    """What stands under each of `keys`, an entry a state; None where something is missing."""
    try:
        columns = [list(map(itemgetter(key), states)) for key in keys]
    except KeyError:
        return None
    return None if any(NoneType in {*map(type, column)} for column in columns) else columns


def _refuse_meta(name: str, param: Tensor) -> None:
    raise RuntimeError(
        f"parameter {name} (shape {tuple(param.shape)}) is on the meta device and has no values to update; "
        "materialise the model (module.to_empty, or load its weights) before training"
    )


# --- what is sharded ------------------------------------------------------------------------------------------------


def _spans(
    reducer: Reducer, family: Family, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> list[Sequence[Span] | None]:
    """The logical tensors in each flat buffer, whose scalar states are made vectors; None for a parameter."""
    spans = [reducer.spans(param) for param in params]
    for state, param, parts in zip(states, params, spans, strict=True):
        if parts is not None and state:
            buffers.load_vectors(state, group, parts, defaults=family.foreign_scalars(group), device=param.device)
    return spans


def _local(
    reducer: Reducer, lists: list[list[Tensor]], spans: list[Sequence[Span] | None], indices: list[int]
) -> tuple[list[list[Tensor]], list[int], list[bool]]:
    """What this rank holds of parameters, gradients (they are local) and moments; the positions; which are present."""
    params, grads, *moments = lists
    local = [list(map(reducer.local, params)), grads, *(list(map(reducer.local, column)) for column in moments)]
    cut: list[list[Tensor]] = [[] for _ in local]
    positions: list[int] = []
    present: list[bool] = []
    for index, parts, param, *tensors in zip(indices, spans, params, *local, strict=True):
        places = [index] if parts is None else [part.position for part in parts]
        positions += places
        # Not whether a gradient is in the list: FSDP1's reducer puts an empty one where this rank holds nothing.
        present += [param.grad is not None] * len(places)
        for column, tensor in zip(cut, tensors, strict=True):
            column += [tensor] if parts is None else [tensor.narrow(0, part.start, part.length) for part in parts]
    return cut, positions, present


def rounds(param_groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The param groups, and once more what stands in them repeatedly: torch.optim steps it as often, in their order.

    Within a group by hand or by the constructor; in two of them by hand alone. What does not belong to a round is None
    in its place.
    """
    left = [list(enumerate(group["params"])) for group in param_groups]
    found = []
    while any(left):
        round_: list[dict[str, Any]] = []
        later: list[list[tuple[int, Any]]] = []
        seen: set[int] = set()
        for group, params in zip(param_groups, left, strict=True):
            kept: list[Any] = [None] * len(group["params"])
            later.append([])
            for place, param in params:
                if id(param) in seen:
                    later[-1].append((place, param))
                else:
                    seen.add(id(param))
                    kept[place] = param
            round_.append({**group, "params": kept})
        found.append(round_)
        left = later
    return found


# --- the scalar states ----------------------------------------------------------------------------------------------


def pack(
    states: Sequence[dict[str, Any]],
    columns: Sequence[Sequence[Any]],
    *,
    keys: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    known: list[int] | None,
) -> tuple[Tensor, list[int] | None, Sequence[tuple[Tensor, Tensor]]]:
    """The scalar states of some parameters (or flat buffers) as rows of one fp32 matrix.

    Args:
        states: `optimizer.state[param]` of each param.
        columns: For each key what stands there under it, an entry a state.
        keys: Names of the scalar states, in the order of the rows.
        shapes: What a scalar state's shape is for each param: (), or (logical tensors,) for a buffer.
        device: Where the matrix goes.
        known: Where the states lay in the last step.

    Returns:
        The matrix, shape (len(keys), n), one column a logical tensor: a buffer takes as many as it has. Where the
        states lie if they lie there side by side, a key after the other; otherwise None. And states that must stay
        where they are, because other processes read them there, with what of the matrix they are to hold.
    """
    held = list(chain.from_iterable(columns))
    # What is no plain tensor (a number, a parameter, an array) was put there by somebody, and is converted.
    if known is not None and {*map(type, held)} == {Tensor}:
        addresses = list(map(Tensor.data_ptr, held))
        way = addresses[0] - known[0]  # Tensor.share_memory_ of one moves all that share its storage
        if addresses == known or [address - way for address in addresses] == known:
            matrix = _matrix_at(held[0], shape=(len(keys), sum(map(math.prod, shapes))), device=device)
            if matrix is not None:
                return matrix, addresses, ()
    return _packed_anew(states, columns, keys=keys, shapes=shapes, device=device)


def _matrix_at(first: Tensor, *, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The matrix that begins with `first`, whose storage holds nothing else; None where that is not so."""
    storage = first.untyped_storage()
    if storage.nbytes() != _BYTES * math.prod(shape) or first.storage_offset():
        return None
    if first.dtype != torch.float32 or first.device != device:
        return None
    return torch.empty(0, dtype=torch.float32, device=device).set_(storage, 0, shape, (shape[1], 1))


def _packed_anew(
    states: Sequence[dict[str, Any]],
    columns: Sequence[Sequence[Any]],
    *,
    keys: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> tuple[Tensor, list[int] | None, Sequence[tuple[Tensor, Tensor]]]:
    """Copy the numbers, and put views of the matrix in their place; shared memory stays in place."""
    rows = [[torch.as_tensor(value, dtype=torch.float32, device=device) for value in column] for column in columns]
    matrix = torch.stack([torch.cat([value.reshape(-1) for value in row]) for row in rows])
    apart = []
    for key, column, row in zip(keys, columns, matrix, strict=True):
        parts = row.split([math.prod(shape) for shape in shapes])
        for state, before, shape, part in zip(states, column, shapes, parts, strict=True):
            if isinstance(before, Tensor) and _is_shared(before):
                apart.append((before, part))
            else:
                state[key] = part.view(shape)
    if apart or type(matrix) is not Tensor:  # FakeTensor and its like have no address
        return matrix, None, apart
    return matrix, [state[key].data_ptr() for key in keys for state in states], ()


def _is_shared(tensor: Tensor) -> bool:
    # On an accelerator torch says so of every tensor.
    return tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.is_shared()  # type: ignore[no-untyped-call]
