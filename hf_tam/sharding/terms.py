"""What each rank of a shard group says of its tensors, laid side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DECAYS", "LOADED", "Row", "Shared", "Terms", "compare", "first_moved"]

LOADED = "has loaded a state"
DECAYS = "has a weight decay, before which max_grad_norm takes a norm of its own,"

_REMEDY = (
    "Build the same model, with the same trainable parameters in the same order, on every rank, and call "
    "add_param_group on every rank before the same step"
)


class Row(NamedTuple):
    """One logical tensor.

    Attributes:
        name: What it is called, None where unknown. Ranks may call it differently.
        kind: Its shape and dtype in words.
        options: The hyperparameters on which all ranks must agree.
    """

    name: str | None
    kind: str
    options: Mapping[str, Any]


class Shared(NamedTuple):
    """The logical tensors that are cut over one process group, in order, and the ranks of the group."""

    ranks: Sequence[int]
    rows: Sequence[Row]


class Terms(NamedTuple):
    """What one rank says.

    Attributes:
        shared: By the name of the process group.
        facts: What else must be equal, in words, and whether it is so.
    """

    shared: Mapping[str, Shared]
    facts: Mapping[str, Any]


def compare(groups: Sequence[ProcessGroup], mine: Terms, *, known: str | None = None) -> None:
    """Check that what this rank shares with others they share with it.

    Communication: one all_gather_object in each of `groups`, which all of its ranks must call.

    Args:
        groups: In the same order on every rank.
        mine: What this rank holds.
        known: What is known to be wrong, to be told to the others.

    Raises:
        RuntimeError: Naming the first difference that this rank, or one that it shares tensors with, has found.
    """
    for group in groups:
        ranks = dist.get_process_group_ranks(group)
        everyone: list[tuple[Terms, str | None]] = [(mine, known)] * len(ranks)
        dist.all_gather_object(everyone, (mine, known), group=group)
        # Carried on to the groups that follow, whose other ranks have not seen this one.
        known = next((found for _, found in everyone if found), None)
        known = known or _difference(ranks, [terms for terms, _ in everyone])
    if known is not None:
        raise RuntimeError(known)


def _difference(ranks: Sequence[int], terms: Sequence[Terms]) -> str | None:
    """The first difference between any two ranks, in words."""
    for name in sorted({name for held in terms for name in held.shared}):
        members = next(held.shared[name].ranks for held in terms if name in held.shared)
        sharing = [
            (rank, held.shared[name].rows if name in held.shared else [])
            for rank, held in zip(ranks, terms, strict=True)
            if rank in members
        ]
        for found in (_lists, _options):
            for rank, rows in sharing[1:]:
                difference = found(*sharing[0], rank, rows)
                if difference is not None:
                    return difference
    for fact in terms[0].facts:
        for rank, held in zip(ranks, terms, strict=True):
            if held.facts[fact] != terms[0].facts[fact]:
                yes, no = (ranks[0], rank) if terms[0].facts[fact] else (rank, ranks[0])
                return f"rank {yes} {fact} and rank {no} has not: do it on every rank before the same step"
    return None


def _lists(rank: int, rows: Sequence[Row], other_rank: int, others: Sequence[Row]) -> str | None:
    moved = first_moved(rows, others)
    for position in range(max(len(rows), len(others))):
        left, right = (part[position] if position < len(part) else None for part in (rows, others))
        if left is None or right is None or left.kind != right.kind or position == moved:
            return (
                f"the ranks of a shard group hold different parameters: number {position} is "
                f"{_called(position, left)} on rank {rank} and {_called(position, right)} on rank {other_rank}. "
                f"{_REMEDY}"
            )
    return None


def first_moved(rows: Sequence[Row], others: Sequence[Row]) -> int | None:
    """The first place at which `others` have the name that only other places have in `rows`.

    Names are not compared otherwise: what one rank calls otherwise, or not at all, may be the same, and tensors of two
    models may have the same name.
    """
    places: dict[str | None, set[int]] = {}
    for position, row in enumerate(rows):
        places.setdefault(row.name, set()).add(position)
    named = ((position, row.name) for position, row in enumerate(others) if row.name is not None)
    return next((position for position, name in named if position not in places.get(name, {position})), None)


def _called(position: int, row: Row | None) -> str:
    return "nothing" if row is None else f"{row.name or f'parameter {position}'} {row.kind}"


def _options(rank: int, rows: Sequence[Row], other_rank: int, others: Sequence[Row]) -> str | None:
    for position, (row, other) in enumerate(zip(rows, others, strict=True)):
        for option, value in row.options.items():
            if other.options[option] != value:
                return (
                    f"the ranks of a shard group have different values of {option}: {value!r} for "
                    f"{_called(position, row)} on rank {rank} and {other.options[option]!r} on rank {other_rank}. "
                    "Give the optimizer the same arguments on every rank, and change them on every rank before the "
                    "same step"
                )
    return None
