"""What the sharded reducers share: rows of all logical tensors, and one all-reduce a group."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_tam.integrations.torch_private import device_types
from hf_tam.sharding.terms import Terms, compare

_MOST_RANKS = 2**24
"""More marks than this are never added up; a smaller sum of squares than this many is no gradient of any use."""


class Reduced(NamedTuple):
    """Sums of whole tensors.

    Attributes:
        sums: Shape (n, columns), one row a tensor.
        present: Whether any rank has a gradient of the tensor, shape (n,) bool; None where all n have one.
    """

    sums: Tensor
    present: Tensor | None = None


class ShardGroups:
    """The process groups over which logical tensors are cut, each with the rows it has to sum.

    Every all-reduce has one row more than there are tensors, for a rank whose tensors, or whose hyperparameters, are
    no longer those that the ranks have agreed on. It still takes part as was agreed, with zeros, and writes into that
    row: who sees it compares lists before the step goes on. So no rank is ever in another collective than the rest.

    Args:
        groups: For each logical tensor, in order, the groups it is cut over (none: this rank holds all of it).
        names: What each logical tensor is called, None where unknown.
        kinds: The shape and dtype of each, in words.

    Attributes:
        rows: The rows of each group.
        terms: What this rank has told the others, once they have agreed.
    """

    def __init__(
        self, groups: Sequence[Sequence[ProcessGroup]], names: Sequence[str | None], kinds: Sequence[str]
    ) -> None:
        """Collect the rows of each group, in the order of the tensors. No communication."""
        self.names, self.kinds = names, kinds
        self.rows: dict[ProcessGroup, list[int]] = {}
        self.terms: Terms | None = None
        self._num_rows = len(groups)
        self._last: tuple[object, tuple[Tensor, Tensor]] | None = None
        self._group_indices: dict[tuple[ProcessGroup, torch.device], Tensor] = {}
        for row, cut_over in enumerate(groups):
            for group in cut_over:
                self.rows.setdefault(group, []).append(row)

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """One all-reduce in each group, of 8 bytes times the columns for each logical tensor and for one row more.

        A gradient of zeros and no gradient have the same sums. The smallest normal number, added to |g|^2 where there
        is a gradient, tells them apart without a column of its own, and changes no other sum.

        Args:
            sums: Shape (n, columns), the last column |g|^2 of the raw gradient.
            rows: The logical tensor of each of the n rows.
            present: Whether this rank has a gradient of it.

        Raises:
            RuntimeError: The lists were compared, and differ.
        """
        at, marks = self._indices(tuple(rows), tuple(present), sums)
        asked = [1.0]
        while any(asked):
            every = sums.new_zeros(self._num_rows + 1, sums.shape[1])
            every[at] = torch.cat([sums[:, :-1], (sums[:, -1] + marks).unsqueeze(1)], dim=1)
            every, asked = self._add_up(every, list(self.rows), look=_is_readable(every))
            self._compare(list(self.rows), asked, self.terms, None)
        result = every[at]
        somewhere = result[:, -1] != 0.0
        only_marks = result[:, -1] < _MOST_RANKS * torch.finfo(sums.dtype).tiny
        result[:, -1] = torch.where(only_marks, 0.0, result[:, -1])
        if not _is_readable(sums):
            somewhere = somewhere & (every[-1, -1] == 0.0)  # where somebody asked nothing is updated
        return Reduced(result, somewhere)

    def ask(
        self,
        mine: Terms,
        like: Tensor,
        *,
        known: str | None = None,
        groups: Sequence[ProcessGroup] | None = None,
    ) -> None:
        """Take part in a step as was agreed, ask the other ranks to compare lists, and do.

        Communication: that of `reduce`, and of `compare`.

        Args:
            mine: What this rank holds now.
            like: The sums of a step without a tensor, shape (0, columns).
            known: What is known to be wrong on this rank, to be told to the others.
            groups: Those whose ranks have agreed; None: all.

        Raises:
            RuntimeError: The lists differ. Or not every rank asked, on an accelerator: the others do not wait for it
                to look, and update nothing in this step.
        """
        every = like.new_zeros(self._num_rows + 1, like.shape[1])
        every[-1, -1] = 1.0
        groups = list(self.rows) if groups is None else groups
        every, asked = self._add_up(every, groups, look=True)
        everybody = list(accumulate((group.size() for group in groups), operator.mul))
        if not _is_readable(every) and asked != everybody:
            raise RuntimeError(
                "the parameters of this optimizer, or its arguments, were changed on this rank, and not on every rank "
                "with which it shares them: change them on every rank before the same step"
            )
        self._compare(groups, asked, mine, known)

    def share(self, numbers: Tensor) -> Tensor:
        """The largest of all ranks' numbers: they are equal, or -inf where a rank knows none. Shape (tensors, k)."""
        for group in self.rows:
            index = self._group_index(group, numbers.device)[:-1]
            numbers[index] = _all_reduce(numbers[index], group, maximum=True)
        return numbers

    def _add_up(self, every: Tensor, groups: Sequence[ProcessGroup], *, look: bool) -> tuple[Tensor, list[float]]:
        """Sum the rows of each group; if this rank may look, also how many have asked, after each of them."""
        asked = []
        for group in groups:
            # The usual case, one group for all tensors: nothing is picked out and put back.
            if len(self.rows[group]) == self._num_rows:
                every = _all_reduce(every, group)
            else:
                index = self._group_index(group, every.device)
                every[index] = _all_reduce(every[index], group)
            if look:
                # The last row is carried from one group to the next: who shares a group with a rank that asks tells
                # the others.
                asked.append(every[-1].tolist()[-1])
        return every, asked

    def _compare(
        self, groups: Sequence[ProcessGroup], asked: Sequence[float], mine: Terms | None, known: str | None
    ) -> None:
        """Compare lists in the groups in which somebody asked for it; where they differ nothing is agreed on any more.

        Communication: one all_gather_object in each of these groups.
        """
        asking = [group for group, count in zip(groups, asked, strict=False) if count]
        if asking and mine is not None:
            self.terms, before = None, self.terms
            compare(asking, mine, known=known)
            self.terms = before

    # Making a tensor of Python numbers on an accelerator waits for it, so indices are kept until they change.
    def _indices(self, rows: tuple[int, ...], present: tuple[bool, ...], sums: Tensor) -> tuple[Tensor, Tensor]:
        key = (rows, present, sums.device)
        if self._last is None or self._last[0] != key:
            at = torch.tensor(rows, dtype=torch.int64, device=sums.device)
            marks = torch.tensor(present, dtype=sums.dtype, device=sums.device) * torch.finfo(sums.dtype).tiny
            self._last = (key, (at, marks))
        return self._last[1]

    def _group_index(self, group: ProcessGroup, device: torch.device) -> Tensor:
        """The rows of a group, and the one row more."""
        if (group, device) not in self._group_indices:
            rows = [*self.rows[group], self._num_rows]
            self._group_indices[group, device] = torch.tensor(rows, dtype=torch.int64, device=device)
        return self._group_indices[group, device]


def _is_readable(tensor: Tensor) -> bool:
    """Whether the host can look at it without waiting for a device."""
    return tensor.device.type == "cpu"


def _all_reduce(tensor: Tensor, group: ProcessGroup, *, maximum: bool = False) -> Tensor:
    """Sum over the group, on a device that its backend can reach (parameters may be offloaded to the CPU)."""
    operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    reachable = device_types(group)
    if tensor.device.type in reachable:
        dist.all_reduce(tensor, operation, group=group)
        return tensor
    moved = tensor.to(reachable[0])
    dist.all_reduce(moved, operation, group=group)
    return moved.to(tensor.device)
