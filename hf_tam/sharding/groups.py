"""What the sharded reducers share: rows of all logical tensors, one all-reduce a group, the check of agreement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_tam.sharding.reducer import Reduced

_MOST_RANKS = 2**24
"""More marks than this are never added up; a smaller sum of squares than this many is no gradient of any use."""


class ShardGroups:
    """The process groups over which logical tensors are cut, each with the rows it has to sum.

    Args:
        groups: For each logical tensor, in order, the groups it is cut over (none: this rank holds all of it).
        descriptions: What each logical tensor is, for the check of agreement.

    Raises:
        RuntimeError: The ranks of a group hold other logical tensors, or hold them in another order.
    """

    def __init__(self, groups: Sequence[Sequence[ProcessGroup]], descriptions: Sequence[str]) -> None:
        """Collect the rows of each group, in the order of the tensors, and check that the ranks agree on them."""
        self.num_rows = len(groups)
        self._rows: dict[ProcessGroup, list[int]] = {}
        self._last: tuple[object, tuple[Tensor, Tensor]] | None = None
        self._group_indices: dict[tuple[ProcessGroup, torch.device], Tensor] = {}
        for row, cut_over in enumerate(groups):
            for group in cut_over:
                self._rows.setdefault(group, []).append(row)
        for group, rows in self._rows.items():
            _require_agreement(group, [descriptions[row] for row in rows])

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """One all-reduce of 8 bytes times the columns of a logical tensor in each group.

        A gradient of zeros and no gradient have the same sums. The smallest normal number, added to |g|^2 where there
        is a gradient, tells them apart without a column of its own, and changes no other sum.

        Args:
            sums: Shape (n, columns), the last column |g|^2 of the raw gradient.
            rows: The logical tensor of each of the n rows.
            present: Whether this rank has a gradient of it.
        """
        at, marks = self._indices(tuple(rows), tuple(present), sums)
        every = sums.new_zeros(self.num_rows, sums.shape[1])
        every[at] = torch.cat([sums[:, :-1], (sums[:, -1] + marks).unsqueeze(1)], dim=1)
        for group, of_group in self._rows.items():
            whole = len(of_group) == self.num_rows
            if whole:
                every = _all_reduce(every, group)
            else:
                index = self._group_index(group, of_group, sums.device)
                every[index] = _all_reduce(every[index], group)
        result = every[at]
        somewhere = result[:, -1] != 0.0
        only_marks = result[:, -1] < _MOST_RANKS * torch.finfo(sums.dtype).tiny
        result[:, -1] = torch.where(only_marks, 0.0, result[:, -1])
        return Reduced(result, somewhere)

    def share(self, numbers: Tensor) -> Tensor:
        """The largest of all ranks' numbers: they are equal, or -inf where a rank knows none. Shape (tensors, k)."""
        for group, of_group in self._rows.items():
            index = self._group_index(group, of_group, numbers.device)
            numbers[index] = _all_reduce(numbers[index], group, maximum=True)
        return numbers

    # Making a tensor of Python numbers on an accelerator waits for it, so indices are kept until they change.
    def _indices(self, rows: tuple[int, ...], present: tuple[bool, ...], sums: Tensor) -> tuple[Tensor, Tensor]:
        key = (rows, present, sums.device)
        if self._last is None or self._last[0] != key:
            at = torch.tensor(rows, dtype=torch.int64, device=sums.device)
            marks = torch.tensor(present, dtype=sums.dtype, device=sums.device) * torch.finfo(sums.dtype).tiny
            self._last = (key, (at, marks))
        return self._last[1]

    def _group_index(self, group: ProcessGroup, rows: list[int], device: torch.device) -> Tensor:
        if (group, device) not in self._group_indices:
            self._group_indices[group, device] = torch.tensor(rows, dtype=torch.int64, device=device)
        return self._group_indices[group, device]


def _all_reduce(tensor: Tensor, group: ProcessGroup, *, maximum: bool = False) -> Tensor:
    """Sum over the group, on a device that its backend can reach (parameters may be offloaded to the CPU)."""
    operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    reachable = {device.type for device in group._device_types}
    if tensor.device.type in reachable:
        dist.all_reduce(tensor, operation, group=group)
        return tensor
    moved = tensor.to(next(iter(group._device_types)))
    dist.all_reduce(moved, operation, group=group)
    return moved.to(tensor.device)


def _require_agreement(group: ProcessGroup, mine: list[str]) -> None:
    everyone: list[list[str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    first, *others = [part if part is not None else [] for part in everyone]
    for position, other in enumerate(others, 1):
        difference = _first_difference(first, other)
        if difference is not None:
            raise RuntimeError(
                f"the ranks of a shard group hold different parameters: {difference} on ranks "
                f"{dist.get_global_rank(group, 0)} and {dist.get_global_rank(group, position)}. Build the same model, "
                "with the same trainable parameters in the same order, on every rank"
            )


def _first_difference(first: list[str], other: list[str]) -> str | None:
    for position in range(max(len(first), len(other))):
        left, right = (part[position] if position < len(part) else "nothing" for part in (first, other))
        if left != right:
            return f"number {position} is {left} and {right}"
    return None
