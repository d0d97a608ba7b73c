"""The scalar states (`step`, `torque`, ...) of the tensors of a step, packed into one matrix.

`optimizer.state` holds views of it, so that a step reads and writes the numbers of all tensors with one operation
each, on the host and on an accelerator alike, and whoever looks at the state sees ordinary 0-d tensors.

What counts is what stands in `optimizer.state`. Others move states (`.data`), replace or convert them, or share them
with other processes; so the matrix is not kept, but made in each step of the memory that the states lie in, if they
still lie there side by side, and of their values if they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

_BYTES = 4


@dataclass(slots=True)
class PackedScalars:
    """The scalar states of some parameters (or flat buffers) as rows of one fp32 matrix.

    Attributes:
        matrix: Shape (len(keys), n), one column a logical tensor: a buffer takes as many as it has. To be written to.
        addresses: Where the states lie if they lie there side by side, a key after the other; otherwise None.
        apart: States that must stay where they are, because other processes read them there, and what of the matrix
            they hold; see `store`.
    """

    matrix: Tensor
    addresses: list[int] | None
    apart: list[tuple[Tensor, Tensor]]

    def store(self) -> None:
        """Let the states hold what the matrix does."""
        for state, part in self.apart:
            state.copy_(part.view(state.shape))


def pack(
    states: Sequence[dict[str, Any]],
    columns: Sequence[Sequence[Any]],
    *,
    keys: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    known: list[int] | None,
) -> PackedScalars:
    """The matrix of the scalar states.

    Args:
        states: `optimizer.state[owner]` of each owner.
        columns: For each key what stands there under it, an entry a state.
        keys: Names of the scalar states, in the order of the rows.
        shapes: What a scalar state's shape is for each owner: (), or (logical tensors,) for a buffer.
        device: Where the matrix goes.
        known: `PackedScalars.addresses` of the last step.
    """
    held = list(chain.from_iterable(columns))
    if known is not None and set(map(type, held)) == {Tensor}:
        addresses = list(map(Tensor.data_ptr, held))
        if addresses == known or _are_moved_together(addresses, known):
            matrix = _matrix_at(held[0], shape=(len(keys), sum(map(math.prod, shapes))), device=device)
            if matrix is not None:
                return PackedScalars(matrix, addresses, [])
    return _packed_anew(states, columns, keys=keys, shapes=shapes, device=device)


def _are_moved_together(addresses: list[int], known: list[int]) -> bool:
    """`Tensor.share_memory_` of one moves all that share its storage."""
    way = addresses[0] - known[0]
    return [address - way for address in addresses] == known


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
) -> PackedScalars:
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
        return PackedScalars(matrix, None, apart)
    return PackedScalars(matrix, [state[key].data_ptr() for key in keys for state in states], [])


def _is_shared(tensor: Tensor) -> bool:
    # On an accelerator torch says so of every tensor.
    return tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.is_shared()  # type: ignore[no-untyped-call]
