"""Where the tensors of a bucket lie, as tables in device memory that the kernels walk.

The tables are built once and kept while nothing moves. Gradients do move, in every step that follows
`zero_grad(set_to_none=True)`: their addresses are a column of their own, and refreshing it is one small copy from
pinned memory that nobody waits for.

A CUDA graph goes on reading the tables that it was captured with: what a capture has used is neither written over nor
freed while the optimizer lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_tam.backends.cpu import is_dense
from hf_tam.backends.entry import Entry
from hf_tam.backends.triton.chunks import FIELDS, MAX_CHUNKS, SPAN

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
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
    aligned: bool
    coupled_decay: float
    maximize: bool


class Chunks(NamedTuple):
    """A stretch of the list of chunks, that of one tensor or more."""

    first: int
    size: int


class Table:
    """The tables of one list of entries.

    Attributes:
        tensors: A row an entry, see `chunks`, int64.
        owners: For each chunk the position of its entry, int32.
        grads: The address of each gradient, int64.
        parts: The chunks of each kind.
        outside: Positions of the entries that the kernels cannot walk; they have no chunk.
    """

    def __init__(self, entries: Sequence[Entry], grads: Sequence[Tensor]) -> None:
        """Build the tables.

        Args:
            entries: What to walk, all on one device.
            grads: Their gradients, as `aligned_grad` gives them.

        Raises:
            RuntimeError: A CUDA graph is being captured, which needs tables that are there already.
        """
        self._device = entries[0].param.device
        if is_capturing(self._device):
            raise RuntimeError(
                "the optimizer sees these tensors for the first time while a CUDA graph is being captured: take at "
                "least one step with the same parameters and states before the capture"
            )
        rows, owners = [[0] * FIELDS for _ in entries], list[int]()
        self.parts: dict[Kind, Chunks] = {}
        self.outside = [at for at, entry in enumerate(entries) if not _is_walkable(entry, grads[at])]
        for kind, positions in _by_kind(entries, grads, set(self.outside)).items():
            begin = len(owners)
            for position in positions:
                rows[position] = _row(entries[position], first_chunk=len(owners))
                owners += [position] * num_chunks(entries[position].param.numel())
            self.parts[kind] = Chunks(begin, len(owners) - begin)
        self.tensors = self._send(torch.tensor(rows, dtype=torch.int64))
        self.owners = self._send(torch.tensor(owners, dtype=torch.int32))
        self._layout = _layout(entries, grads)
        self._grad_dtypes = [grad.dtype for grad in grads]
        self._grad_strides = [grad.stride() for grad in grads]
        self._grad_offsets = [grad.data_ptr() % _VECTOR for grad in grads]
        self._addresses: list[int] = []
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []
        self.grads = self.owners  # replaced at once
        self.refresh([grad.data_ptr() for grad in grads])

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph may be reading the tables."""
        return bool(self._captured)

    def fits(self, entries: Sequence[Entry], grads: Sequence[Tensor]) -> bool:
        """Whether the tables are those of `entries`, wherever the gradients have gone."""
        return self._layout == _layout(entries, grads)

    def takes(self, grads: Sequence[Tensor], addresses: Sequence[int]) -> bool:
        """Whether these gradients of the same entries, at `addresses`, differ from the last ones by no more."""
        return (
            all(type(grad) is Tensor for grad in grads)
            and [grad.dtype for grad in grads] == self._grad_dtypes
            and list(map(Tensor.stride, grads)) == self._grad_strides
            and not any(map(Tensor.is_neg, grads))
            and (addresses == self._addresses or [at % _VECTOR for at in addresses] == self._grad_offsets)
        )

    def refresh(self, addresses: list[int]) -> None:
        """Point at the gradients there.

        Raises:
            RuntimeError: They have moved since the last capture of a CUDA graph, and this is another one.
        """
        capturing = is_capturing(self._device)
        if addresses != self._addresses:
            # Always a new column: a graph, or a kernel that has not run yet, may be reading the old one.
            self.grads = self._captured_column(addresses) if capturing else self._column(addresses)
            self._addresses = addresses
        if capturing:
            self._captured.append(self.grads)

    def _column(self, addresses: list[int]) -> Tensor:
        if self._spare is None and self._device.type == "cuda":
            self._spare = torch.empty(len(addresses), dtype=torch.int64, pin_memory=True)
        return self._send(torch.tensor(addresses, dtype=torch.int64))

    def _captured_column(self, addresses: list[int]) -> Tensor:
        # No memory can be pinned during a capture, so some was put by. The graph reads it at every replay.
        spare, self._spare = self._spare, None
        if spare is None:
            raise RuntimeError(
                "the gradients have moved since the last CUDA graph was captured with this optimizer: take a step "
                "outside of a capture before the next one"
            )
        self._captured.append(spare.copy_(torch.tensor(addresses, dtype=torch.int64)))
        return torch.empty_like(self.grads).copy_(spare, non_blocking=True)

    def _send(self, values: Tensor) -> Tensor:
        # The pinned copy may be freed at once: torch's allocator does not hand it out again before the transfer.
        return values if self._device.type == "cpu" else values.pin_memory().to(self._device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether work on the current stream goes into a CUDA graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def aligned_grad(entry: Entry) -> Tensor:
    """The gradient in the parameter's memory order; a copy only where it came in another."""
    grad, param = entry.raw_grad, entry.param
    if (grad.stride() == param.stride() and not grad.is_neg()) or not is_dense(param):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _is_walkable(entry: Entry, grad: Tensor) -> bool:
    """Whether raw pointers lead to the right elements: plain tensors of one dense layout."""
    param = entry.param
    moments = [entry.first] if entry.second is None else [entry.first, entry.second]
    return (
        all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (param, grad, *moments))
        and param.dtype in _DTYPES
        and grad.dtype in _DTYPES
        and is_dense(param)
        and grad.stride() == param.stride()
        and all(moment.dtype == param.dtype and moment.stride() == param.stride() for moment in moments)
    )


def _layout(entries: Sequence[Entry], grads: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """All that the tables were made of, but for where the gradients are."""
    return [
        (
            entry.param.data_ptr(), entry.param.shape, entry.param.stride(), entry.param.dtype,
            entry.first.data_ptr(), entry.first.stride(), entry.first.dtype,
            entry.second is not None and (entry.second.data_ptr(), entry.second.stride(), entry.second.dtype),
            grad.dtype, grad.stride(), grad.data_ptr() % _VECTOR, entry.coupled_decay, entry.maximize,
        )
        for entry, grad in zip(entries, grads, strict=True)
    ]  # fmt: skip


def _row(entry: Entry, *, first_chunk: int) -> list[int]:
    numel = entry.param.numel()
    second = 0 if entry.second is None else entry.second.data_ptr()
    addresses = [entry.param.data_ptr(), entry.first.data_ptr(), second]
    return [*addresses, numel, chunk_length(numel), first_chunk, num_chunks(numel)]


def _by_kind(entries: Sequence[Entry], grads: Sequence[Tensor], outside: set[int]) -> dict[Kind, list[int]]:
    kinds: dict[Kind, list[int]] = {}
    for position, (entry, grad) in enumerate(zip(entries, grads, strict=True)):
        if position not in outside:
            tensors = (entry.param, entry.first, entry.first if entry.second is None else entry.second, grad)
            aligned = all(tensor.data_ptr() % _VECTOR == 0 for tensor in tensors)
            kind = Kind(entry.param.dtype, grad.dtype, aligned, float(entry.coupled_decay), entry.maximize)
            kinds.setdefault(kind, []).append(position)
    return kinds
