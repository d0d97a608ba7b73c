"""The scalar states (`step`, `torque`, ...) of the tensors of one param group, packed into one matrix.

`optimizer.state` holds views of it, so that a step reads and writes the numbers of all tensors with one operation
each, on the host and on an accelerator alike, and whoever looks at the state sees ordinary 0-d tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_tam import update


class PackedScalars:
    """The scalar states of some parameters (or flat buffers) as rows of one fp32 matrix.

    Attributes:
        matrix: Shape (len(keys), n), one column a logical tensor: a buffer takes as many as it has.
    """

    def __init__(self, states: Sequence[dict[str, Any]], *, keys: Sequence[str]) -> None:
        """Copy the numbers of `states`, and put views of the matrix in their place.

        Args:
            states: `optimizer.state[owner]` of each owner, with 0-d states, or 1-D ones for a buffer.
            keys: Names of the scalar states, in the order of the rows.
        """
        self._keys = tuple(keys)
        shapes = [state[keys[0]].shape for state in states]
        self.matrix = torch.stack([torch.cat([state[key].reshape(-1) for state in states]) for key in keys])
        self._views: list[dict[str, Tensor]] = [{} for _ in states]
        for key, row in zip(keys, self.matrix, strict=True):
            parts = row.split([shape.numel() for shape in shapes])
            for state, views, shape, part in zip(states, self._views, shapes, parts, strict=True):
                state[key] = views[key] = part.view(shape)
        self._addresses = self._where(states)

    def holds(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether these states, and no others, still are the views that were put there, and lie where they did."""
        if len(states) != len(self._views):
            return False
        keys = self._keys
        for state, views in zip(states, self._views, strict=True):
            for key in keys:
                if state.get(key) is not views[key]:
                    return False
        return self._where(states) == self._addresses

    def _where(self, states: Sequence[dict[str, Any]]) -> list[int]:
        """Who moves states by `.data`, to offload them, moves all of them: one a tensor tells."""
        return [state[self._keys[0]].data_ptr() for state in states]

    def read(self) -> dict[str, Tensor]:
        """The numbers by name, shape (n,), a copy in `accumulator_dtype`."""
        numbers = self.matrix.to(update.accumulator_dtype(self.matrix.device))
        return dict(zip(self._keys, numbers.unbind(), strict=True))
