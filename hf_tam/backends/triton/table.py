"""Where the tensors of a batch lie, as tables in device memory that the kernels walk.

The tables are built once and kept while nothing moves. Gradients do move, in every step that follows
`zero_grad(set_to_none=True)`, and learning rates do: addresses of gradients and hyperparameters are a column of their
own, and refreshing it is one small copy from pinned memory that nobody waits for.

A CUDA graph goes on reading the tables that it was captured with: what a capture has used is neither written over nor
freed while the optimizer lives.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hf_tam.backends.tensors import Tensors
from hf_tam.backends.triton.chunks import FIELDS, MAX_CHUNKS, SPAN
from hf_tam.update import Numbers

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
# Moments are computed with in the dtype of the parameter, fp32 at least, and must not be wider than that.
_PAIRS = {(dtype, dtype) for dtype in _DTYPES} | {(dtype, torch.float32) for dtype in _DTYPES if dtype.itemsize == 2}
_VECTOR = 16
"""Bytes of the widest load, which a launch uses if all of its tensors begin at a multiple."""


def chunk_length(numel: int) -> int:
    """Elements of each chunk but the last: whole spans, at least one, and at most `MAX_CHUNKS` chunks a tensor."""
    spans = -(-numel // SPAN)
    return SPAN * max(1, -(-spans // MAX_CHUNKS))


def num_chunks(numel: int) -> int:
    """At least one: a tensor without elements has a step count all the same."""
    return max(1, -(-numel // chunk_length(numel)))


class Kind(NamedTuple):
    """What is compiled into a kernel: tensors that differ in it take launches of their own."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    corrected: bool
    aligned: bool
    coupled: bool
    maximize: bool


class Chunks(NamedTuple):
    """A stretch of the list of chunks, that of one tensor or more."""

    first: int
    size: int


class _Key(NamedTuple):
    """What the tables depend on besides where parameters and moments lie."""

    groups: list[int]
    coupled: list[bool]
    grad_dtypes: list[torch.dtype]
    grad_offsets: list[int]
    outside: list[int]
    maximize: bool


class Table:
    """The tables of the tensors of a batch.

    Attributes:
        tensors: A row a tensor, see `chunks`, int64.
        chunk_places: For each chunk the place of its tensor, int32.
        grads: The address of each gradient, int64.
        numbers: The fields of `Numbers` of each param group, fp64.
        parts: The chunks of each kind.
        outside: Places of the tensors that the kernels cannot walk; they have no chunk.
    """

    def __init__(self, tensors: Tensors, key: _Key) -> None:
        """Build the tables.

        Raises:
            RuntimeError: A CUDA graph is being captured, which needs tables that are there already.
        """
        self._device = tensors.params[0].device
        if is_capturing(self._device):
            raise RuntimeError(
                "the optimizer sees these tensors for the first time while a CUDA graph is being captured: take at "
                "least one step with the same parameters and states before the capture"
            )
        self.key, self.outside = key, key.outside
        rows, chunk_places = [[0] * FIELDS for _ in tensors.params], list[int]()
        self.parts: dict[Kind, Chunks] = {}
        for kind, places in _by_kind(tensors, key).items():
            begin = len(chunk_places)
            for at in places:
                rows[at] = _row(tensors, at, first_chunk=len(chunk_places))
                chunk_places += [at] * num_chunks(rows[at][3])
            self.parts[kind] = Chunks(begin, len(chunk_places) - begin)
        self.tensors = self._send(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        self.chunk_places = self._send(torch.tensor(chunk_places, dtype=torch.int32, device="cpu"))
        self._values: list[int] = []
        self._spare: Tensor | None = None
        self.grads = self.numbers = self.chunk_places  # replaced at once

    def refresh(self, tensors: Tensors, addresses: list[int]) -> None:
        """Point at the gradients there, and take the hyperparameters of this step.

        Raises:
            RuntimeError: They have moved since the last capture of a CUDA graph, and this is another one.
        """
        capturing = is_capturing(self._device)
        values = addresses + _bits(tensors.numbers)
        if values != self._values:
            # Always a new column: a graph, or a kernel that has not run yet, may be reading the old one.
            column = self._captured_column(values, tensors.captured) if capturing else self._column(values)
            self.grads, self.numbers = column[: len(addresses)], column[len(addresses) :].view(torch.float64)
            self._values = values
        if capturing:
            tensors.captured.append((self, self.grads))

    def _column(self, values: list[int]) -> Tensor:
        if self._spare is None and self._device.type == "cuda":
            self._spare = torch.empty(len(values), dtype=torch.int64, device="cpu", pin_memory=True)
        return self._send(torch.tensor(values, dtype=torch.int64, device="cpu"))

    def _captured_column(self, values: list[int], captured: list[object]) -> Tensor:
        # No memory can be pinned during a capture, so some was put by. The graph reads it at every replay.
        spare, self._spare = self._spare, None
        if spare is None:
            raise RuntimeError(
                "the gradients, or hyperparameters, have moved since the last CUDA graph was captured with this "
                "optimizer: take a step outside of a capture before the next one"
            )
        captured.append(spare.copy_(torch.tensor(values, dtype=torch.int64, device="cpu")))
        return torch.empty(len(values), dtype=torch.int64, device=self._device).copy_(spare, non_blocking=True)

    def _send(self, values: Tensor) -> Tensor:
        # The pinned copy may be freed at once: torch's allocator does not hand it out again before the transfer.
        return values if self._device.type == "cpu" else values.pin_memory().to(self._device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether work on the current stream goes into a CUDA graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def aligned_grads(tensors: Tensors) -> list[Tensor]:
    """The gradients in their parameters' memory order; a copy only where one came in another."""
    if tensors.fits is None:
        return tensors.grads
    return [_aligned(tensors, at) for at in range(len(tensors))]


def _aligned(tensors: Tensors, at: int) -> Tensor:
    grad, param = tensors.grads[at], tensors.params[at]
    if (grad.stride() == param.stride() and not grad.is_neg()) or not tensors.memory.walkable[at]:
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def key_of(tensors: Tensors, grads: Sequence[Tensor], addresses: Sequence[int]) -> _Key:
    """What the tables of these tensors depend on; `grads` are those of `aligned_grads`, at `addresses`."""
    walkable, params = tensors.memory.walkable, tensors.memory.signature.params
    outside: list[int] = []
    firsts = tensors.memory.signature.firsts
    if tensors.walkable(_PAIRS) is not None:
        outside = [
            at
            for at, grad in enumerate(grads)
            if not walkable[at]
            or (params.dtypes[at], firsts.dtypes[at]) not in _PAIRS
            or grad.dtype not in _DTYPES
            or type(grad) is not Tensor
            or grad.stride() != params.strides[at]
        ]
    return _Key(
        list(tensors.groups),
        [float(numbers.coupled_decay) != 0.0 for numbers in tensors.numbers],
        [grad.dtype for grad in grads],
        [address % _VECTOR for address in addresses],
        outside,
        tensors.maximize,
    )


def _bits(numbers: Sequence[Numbers]) -> list[int]:
    """The hyperparameters as 64 bits each; 0 for a learning rate that the host does not know."""
    return list(array("q", array("d", chain.from_iterable(row.floats() for row in numbers)).tobytes()))


def _row(tensors: Tensors, at: int, *, first_chunk: int) -> list[int]:
    signature = tensors.memory.signature
    numel = math.prod(signature.params.shapes[at])
    second = signature.second_addresses[at] if tensors.seconds else 0
    addresses = [signature.param_addresses[at], signature.first_addresses[at], second]
    correction = signature.correction_addresses[at] if tensors.corrections else 0
    length, count = chunk_length(numel), num_chunks(numel)
    return [*addresses, numel, length, first_chunk, count, tensors.groups[at], correction]


def _by_kind(tensors: Tensors, key: _Key) -> dict[Kind, list[int]]:
    kinds: dict[Kind, list[int]] = {}
    signature, outside = tensors.memory.signature, set(key.outside)
    for at, param in enumerate(tensors.params):
        if at not in outside:
            held = [signature.param_addresses[at], signature.first_addresses[at], key.grad_offsets[at]]
            held += [signature.second_addresses[at]] if tensors.seconds else []
            held += [signature.correction_addresses[at]] if tensors.corrections else []
            aligned = all(address % _VECTOR == 0 for address in held)
            coupled = key.coupled[key.groups[at]]
            dtypes = param.dtype, key.grad_dtypes[at], signature.firsts.dtypes[at]
            kind = Kind(*dtypes, bool(tensors.corrections), aligned, coupled, key.maximize)
            kinds.setdefault(kind, []).append(at)
    return kinds
