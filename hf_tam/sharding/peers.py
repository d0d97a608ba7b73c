"""What the processes of a job tell one another outside of collectives, through the store of torch.distributed.

A collective that one rank does not join never ends. Here every wait is bounded, and who is waited for may say that he
will not come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from hf_tam.integrations.torch_private import default_group, default_store

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Peers", "Standing", "find_peers"]

PATIENCE_S = 10.0
"""How long to wait, once, for ranks that may be there for another purpose; who trains together comes soon."""
SHORT_PATIENCE_S = 2.0
"""The same where a difference would be no matter for this rank, but may be for another."""
_GRACE_S = 1.0
"""How long to wait for a rank that has last stepped another optimizer: it may be about to make this one."""
_WATCHED = 8
"""Of how many ranks each one looks where they are; all together see to all, and the store has not much to do."""
_COME = "all have come"


class Standing(NamedTuple):
    """What a rank says of its optimizer when it begins to step it.

    Attributes:
        groups: The names of the process groups over which its parameters are cut.
        last: Whether no other optimizer of this process waits for its first step.
        kinds: A digest of the shapes and dtypes of its parameters.
        values: A digest of their values, where it takes all of them together and no step has changed them yet.
        gradients: A digest of the gradient of each and its norm, where it takes all together and holds them whole.
        options: The hyperparameters on which all ranks must agree, those of each param group.
        takes_all: Whether anything is taken over all parameters together.
        trouble: Why it cannot be stepped at all.
    """

    groups: Sequence[str] = ()
    last: bool = True
    kinds: str = ""
    values: str = ""
    gradients: Sequence[tuple[str, float]] = ()
    options: Sequence[Mapping[str, Any]] = ()
    takes_all: bool = False
    trouble: str | None = None


class Peers:
    """The other processes of the default process group.

    Optimizers are told apart by turns: the first that is stepped has turn 0 on every rank, and so on. Ranks that step
    optimizers of their own beside (a probe on rank 0) have had more turns, so what is compared by turn is only what
    those hold who come to it, and who meets in a process group is found by the group.

    Args:
        group: The default process group.
        store: Its store.
    """

    def __init__(self, group: ProcessGroup, store: Any) -> None:
        """No communication."""
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._store = store
        self._turns = 0
        self._is_patient = True
        self._meetings: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()

    def tell(self, standing: Standing) -> int:
        """Say what this rank steps now; two writes to the store. Returns the turn."""
        turn = self._turns
        self._turns += 1
        self._store.set(f"hf_tam/{turn}/{self.rank}", json.dumps(standing))
        self._store.set(f"hf_tam/latest/{self.rank}", str(turn))
        return turn

    def expect_another(self) -> None:
        """Say that an optimizer was made that has not told anything yet; one write to the store, if this rank had."""
        if self._turns:
            self._store.set(f"hf_tam/{self._turns - 1}/{self.rank}/more", "")

    def condemn(self, turn: int, trouble: str) -> None:
        """Tell everybody whose turn it is what is wrong; one write to the store."""
        self._store.set(f"hf_tam/{turn}/verdict", trouble)

    def verdict(self, turn: int) -> str | None:
        """What somebody found wrong with the optimizers of a turn; "" for nothing, None where nobody knows yet.

        A read or two of the store, without waiting.
        """
        key = f"hf_tam/{turn}/verdict"
        return str(self._store.get(key).decode()) if self._has(key) else None

    def compare(self, turn: int, mine: Standing, different: Callable[[int, Standing], str | None]) -> str | None:
        """Whether all ranks do the same, as far as they come to this turn in time.

        A few reads and writes of the store. A rank that takes all parameters together waits for the others for
        `PATIENCE_S`, any other for a moment, and never again once nobody came.

        Args:
            turn: That of the optimizer.
            mine: What this rank has told.
            different: Says what is wrong, if anything, when another rank, whose number it is given, has told that.

        Returns:
            As `verdict`.
        """
        prefix = f"hf_tam/{turn}"
        first = int(self._first(f"{prefix}/first", str(self.rank)))  # with whom all compare
        told = self._standing(first, turn)
        trouble = None if told is None else different(first, told)
        if trouble is not None:
            self.condemn(turn, trouble)
        elif self._store.add(f"{prefix}/same", 1) == self.world:
            self._store.set(f"{prefix}/verdict", "")
        seconds = PATIENCE_S if mine.takes_all else SHORT_PATIENCE_S if self._is_patient else 0.0
        found = _until(lambda: self.verdict(turn), seconds)
        self._is_patient = self._is_patient and found is not None
        return found

    def meet(self, group: ProcessGroup, turn: int) -> str | None:
        """Wait until every rank of `group` is here, so that a collective is not waited for in vain.

        Some reads and writes of the store, until its timeout.

        Returns:
            None, or which ranks do not come, and why: the same on all ranks.
        """
        ranks = dist.get_process_group_ranks(group)
        number = self._meetings.get(group, 0)
        while self._has(f"hf_tam/{group.group_name}/{number}/outcome"):  # others have given up to wait for this rank
            number += 1
        self._meetings[group] = number + 1
        place = f"hf_tam/{group.group_name}/{number}"
        outcome = f"{place}/outcome"
        self._store.set(f"{place}/{self.rank}", "")
        if self._store.add(f"{place}/count", 1) == len(ranks):
            self._first(outcome, _COME)

        began = time.monotonic()

        def look() -> str | None:
            if self._has(outcome):
                return str(self._store.get(outcome).decode())
            if time.monotonic() < began + _GRACE_S:
                return None
            troubles = (self._absence(rank, group) for rank in self._after(ranks) if not self._has(f"{place}/{rank}"))
            trouble = self.verdict(turn) or next(filter(None, troubles), None)
            # What is written first counts: no rank may begin a collective that another has given up.
            return self._first(outcome, trouble) if trouble else None

        seconds = self._store.timeout.total_seconds()
        found = _until(look, seconds)
        if found is None:
            absent = [rank for rank in ranks if not self._has(f"{place}/{rank}")]
            late = f"ranks {absent} of {ranks} did not come to the first step of this optimizer in {seconds:.0f} s"
            found = self._first(outcome, late)
        if found == _COME:
            return None
        self.condemn(turn, found)
        return found

    def _absence(self, rank: int, group: ProcessGroup) -> str | None:
        """Why a rank will not come to a meeting, where it has said so: of the optimizer that it began to step last."""
        latest = f"hf_tam/latest/{rank}"
        if not self._has(latest):
            return None
        turn = int(self._store.get(latest))
        standing = self._standing(rank, turn)
        if standing is None or self._has(f"hf_tam/{turn}/{rank}/more"):
            return None
        if standing.trouble is not None:
            return f"on rank {rank}: {standing.trouble}"
        if group.group_name in standing.groups or not standing.last:
            return None
        return (
            f"the optimizer of rank {rank} holds none of the parameters that are cut over ranks "
            f"{dist.get_process_group_ranks(group)}: build it with the same parameters on every rank, those included "
            "of which a rank holds no element"
        )

    def _standing(self, rank: int, turn: int) -> Standing | None:
        key = f"hf_tam/{turn}/{rank}"
        return Standing(*json.loads(self._store.get(key))) if self._has(key) else None

    def _after(self, ranks: Sequence[int]) -> list[int]:
        """Those that this rank watches: the next ones in a circle."""
        mine = ranks.index(self.rank)
        return [*ranks[mine + 1 :], *ranks[:mine]][:_WATCHED]

    def _first(self, key: str, value: str) -> str:
        """What was written first; an empty value stands for "nothing yet"."""
        # An empty expected value is what the store compares with a key that is not there yet (Store.compare_set).
        return str(self._store.compare_set(key, "", value).decode())

    def _has(self, key: str) -> bool:
        # `get` would wait for a key that is not there, for as long as the timeout of the store.
        return bool(self._store.check([key]))


# By the group, since a job may destroy it and make another: turns and keys of the store begin anew with that.
_peers: WeakKeyDictionary[ProcessGroup, Peers] = WeakKeyDictionary()


def find_peers() -> Peers | None:
    """The other processes of the default process group; None where there is no store (MPI). No communication."""
    group = default_group()
    if group not in _peers:
        store = default_store()
        if store is None:
            return None
        _peers[group] = Peers(group, store)
    return _peers[group]


def _until(look: Callable[[], str | None], seconds: float) -> str | None:
    """Look until something is found. Not by `Store.wait`, which prints a warning when its time is over."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return found
