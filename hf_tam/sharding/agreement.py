"""That the ranks which step an optimizer together hold the same, and do the same with it.

Ranks that share tensors compare lists at the first step, and in every step in which one of them holds another list or
has other hyperparameters than before: see `ShardGroups`. Scope "model" and `max_grad_norm` take all parameters of an
optimizer together, so that with them the ranks that share nothing are compared too, as far as they come: see `Peers`.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from math import isclose
from typing import TYPE_CHECKING, ClassVar, NoReturn
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor

from hf_tam.sharding.company import several_processes
from hf_tam.sharding.groups import ShardGroups
from hf_tam.sharding.peers import Peers, Standing, find_peers
from hf_tam.sharding.reducer import Reducer
from hf_tam.sharding.stepped import Stepped, digest, no_sums
from hf_tam.sharding.terms import LOADED, Row, Terms, compare, first_moved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Agreement"]

_SAME_GRADIENT = 1e-3
"""By how much of itself the norm of a gradient may differ between replicas that have not summed in the same order."""
_PARTS = (
    "ranks {mine} and {other} step different parameters, and scope='model' and max_grad_norm go over all parameters "
    "of an optimizer together. Where the ranks hold parts of one model (stages of a pipeline, experts), use "
    "scope='tensor', which is exact there, and clip before the step, by a norm over all ranks. Where each rank trains "
    "a model of its own, say so: optimizer.attach(model, whole=True)"
)
_ZERO_REDUNDANCY = (
    "ZeroRedundancyOptimizer hands each rank a part of the parameters, and scope='model' and max_grad_norm go over "
    "all parameters of an optimizer together: use scope='tensor', which is exact there, and "
    "torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before the step"
)


class Agreement:
    """What one optimizer has agreed on with those of the other ranks.

    Attributes:
        alone: Whether the user has said that no other rank holds a part of this optimizer's model.
    """

    _unstepped: ClassVar[WeakSet[Agreement]] = WeakSet()  # of this process, see `Standing.last`

    def __init__(self) -> None:
        """Nothing is agreed on yet. Among several processes the store is told that there is one more to come."""
        self.alone = False
        peers = find_peers() if several_processes() and dist.get_backend() != "fake" else None
        if peers is not None:
            peers.expect_another()
        self._unstepped.add(self)
        self._forget()

    def _forget(self) -> None:
        self._settled: dict[Reducer, object] = {}
        self._layout: object = None
        self._rows: list[Row] = []
        self._turn: int | None = None
        self._steps = 0

    def settle(self, stepped: Stepped) -> None:
        """Compare with the other ranks where that is due; every step asks.

        Communication: none in one process. Otherwise a few reads and writes of torch.distributed's store at the first
        step, and a read at steps 2, 4, 8 and so on. Where tensors are cut, one all_gather_object in each shard group
        at the first step; and again in a step in which the list of a rank has changed, with one all-reduce more.

        Raises:
            RuntimeError: The ranks hold different parameters, or would do different things with them.
        """
        if not several_processes():
            return
        before, steering, cut = self._before(stepped), stepped.steering(), stepped.reducer.groups
        is_agreed = cut is None or cut.terms is not None
        if is_agreed and self._settled.get(stepped.reducer) == steering and not stepped.tells:
            self._look_again(stepped)
            return
        rows = stepped.rows()
        layout = stepped.layout(rows)
        is_same = layout == self._layout and first_moved(self._rows, rows) is None
        if not is_same or stepped.is_partitioned or stepped.tells:
            self._agree(stepped, rows, before)
        elif cut is not None and before is not None:  # the same tensors, in other objects
            cut.terms = before.terms
        if not stepped.is_partitioned:
            self._settled.clear()
        self._settled[stepped.reducer], self._layout, self._rows = steering, layout, rows

    @contextlib.contextmanager
    def telling(self, params: Sequence[Tensor]) -> Iterator[None]:
        """If this rank cannot step `params`, tell the ranks that may wait for it why.

        Communication: none, if it can. Otherwise that of a step in which the list has changed; a write to the store
        before the first one.
        """
        try:
            yield
        except RuntimeError as error:
            if several_processes() and dist.get_backend() != "fake":
                self._give_up(str(error), no_sums(params))
            raise

    def _give_up(self, trouble: str, nothing: Tensor) -> None:
        self._unstepped.discard(self)
        agreed = [reducer.groups for reducer in self._settled if reducer.groups is not None]
        peers = find_peers()
        if len(agreed) == 1 and agreed[0].terms is not None:
            with contextlib.suppress(RuntimeError):
                # This rank is told of its own trouble as well, which `telling` is about to raise.
                agreed[0].ask(agreed[0].terms, nothing, known=f"on rank {dist.get_rank()}: {trouble}")
        elif peers is not None:
            peers.tell(Standing(trouble=trouble))
        self._forget()

    def _before(self, stepped: Stepped) -> ShardGroups | None:
        """The groups in which the ranks have agreed; after a refusal all of them begin anew."""
        if stepped.is_partitioned:
            cut = stepped.reducer.groups
            return None if cut is None or cut.terms is None else cut
        cut = next((reducer.groups for reducer in self._settled), None)
        if cut is not None and cut.terms is None:
            self._forget()
            return None
        return cut

    def _agree(self, stepped: Stepped, rows: Sequence[Row], before: ShardGroups | None) -> None:
        """Compare lists with those who share tensors with this rank, and where it matters with all."""
        if dist.get_backend() == "fake":  # it only says that there are other processes
            return
        self._unstepped.discard(self)
        cut, terms = stepped.reducer.groups, stepped.terms(rows)
        peers = None if self.alone and cut is None else find_peers()  # whose turns are those of shared optimizers
        if before is not None:
            before.ask(terms, stepped.no_sums())
        held = [] if cut is None else list(cut.rows)
        agreed = [group for group in held if before is not None and group in before.rows]
        takes_all = stepped.takes_all and not self.alone
        standing = Standing(
            groups=[group.group_name for group in held],
            last=not self._unstepped,
            kinds=digest(row.kind.encode() for row in rows),
            values=stepped.values() if takes_all else "",
            gradients=stepped.gradients() if takes_all else (),
            options=stepped.options(),
            takes_all=takes_all,
        )
        if peers is not None:
            self._turn, self._steps = peers.tell(standing), 1
        for group in [group for group in held if group not in agreed]:
            trouble = self._come_together(group, terms, peers)
            if trouble is not None:
                self._refuse(trouble, stepped, terms, agreed)
            agreed.append(group)
        trouble = None if peers is None else self._compare_with_all(stepped, standing, peers)
        if trouble:
            self._refuse(trouble, stepped, terms, agreed)
        if cut is not None:
            # What was loaded is told in the step that follows, and is no difference later on.
            cut.terms = terms._replace(facts={**terms.facts, LOADED: False})

    def _come_together(self, group: ProcessGroup, terms: Terms, peers: Peers | None) -> str | None:
        """What is wrong in a group whose ranks meet for the first time."""
        trouble = None if peers is None or self._turn is None else peers.meet(group, self._turn)
        if trouble is None:
            try:
                compare([group], terms)
            except RuntimeError as error:
                trouble = str(error)
                if peers is not None and self._turn is not None:
                    peers.condemn(self._turn, trouble)
        return trouble

    def _compare_with_all(self, stepped: Stepped, mine: Standing, peers: Peers) -> str | None:
        """What is wrong with what the ranks do that share nothing with this one."""
        cut = stepped.reducer.groups
        if mine.takes_all and self._belongs_to_zero_redundancy():
            return _ZERO_REDUNDANCY
        # Who shares tensors with all ranks, or with some and wants nothing of the others, has compared what matters.
        among_all = cut is not None and any(group.size() == peers.world for group in cut.rows)
        if self._turn is None or self.alone or not mine.last or among_all or (cut is not None and not mine.takes_all):
            return None

        def different(rank: int, told: Standing) -> str | None:
            if mine.kinds == told.kinds and mine.options != told.options and (mine.takes_all or told.takes_all):
                return _other_options(peers.rank, mine, rank, told)
            if mine.takes_all and told.takes_all and _hold_parts(mine, told):
                return _PARTS.format(mine=peers.rank, other=rank)
            return None

        return peers.compare(self._turn, mine, different)

    def _look_again(self, stepped: Stepped) -> None:
        """Ask now and then whether somebody who came later has found something wrong."""
        self._steps += 1
        peers = find_peers()
        # At steps 2, 4, 8 and so on: who comes late is heard of, and a long run asks the store a few dozen times.
        if peers is None or self._turn is None or self._steps & (self._steps - 1):
            return
        trouble = peers.verdict(self._turn)
        if trouble == "":
            self._turn = None
        elif trouble:
            cut = stepped.reducer.groups
            terms = Terms({}, {}) if cut is None or cut.terms is None else cut.terms
            self._refuse(trouble, stepped, terms, [] if cut is None else list(cut.rows))

    def _refuse(self, trouble: str, stepped: Stepped, terms: Terms, agreed: Sequence[ProcessGroup]) -> NoReturn:
        """Raise, after telling the ranks that have agreed with this one and are about to sum."""
        cut = stepped.reducer.groups
        if cut is not None:
            if agreed:
                with contextlib.suppress(RuntimeError):
                    cut.ask(terms, stepped.no_sums(), known=trouble, groups=agreed)
            cut.terms = None
        self._forget()
        raise RuntimeError(trouble)

    def _belongs_to_zero_redundancy(self) -> bool:
        module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
        kind = getattr(module, "ZeroRedundancyOptimizer", None)
        # Nothing leads from an optimizer to who steps it.
        # The type is asked first: `isinstance` alone reads `__class__`, by which proxies run code of their own.
        return kind is not None and any(
            isinstance(found, kind) and getattr(found.optim, "agreement", None) is self
            for found in gc.get_objects()
            if issubclass(type(found), kind)
        )


def _hold_parts(mine: Standing, told: Standing) -> bool:
    """Whether two ranks hold other parameters, or have some of them in common only.

    Experts may begin as copies of one: then their gradients tell, where there are others that are the same. Replicas
    have the same gradients (but for the last bits, perhaps), ranks that average their weights now and then have none
    in common.
    """
    if mine.kinds != told.kinds or (mine.values and told.values and mine.values != told.values):
        return True
    both = {digest for digest, _ in mine.gradients} & {digest for digest, _ in told.gradients}
    left, right = (
        sorted(norm for digest, norm in standing.gradients if digest not in both) for standing in (mine, told)
    )
    if not both:
        return False
    return len(left) != len(right) or not all(map(partial(isclose, rel_tol=_SAME_GRADIENT), left, right))


def _other_options(rank: int, mine: Standing, other_rank: int, other: Standing) -> str:
    """The first hyperparameter that differs, where two ranks step the same parameters."""
    nothing: dict[str, object] = {}
    name, value, others = next(
        (name, left.get(name), right.get(name))
        for left, right in zip_longest(mine.options, other.options, fillvalue=nothing)
        for name in {**left, **right}
        if left.get(name) != right.get(name)
    )
    return (
        f"ranks {rank} and {other_rank} step the same parameters with different values of {name}, {value!r} and "
        f"{others!r}: give the optimizer the same arguments on every rank. Where each rank trains a model of its own, "
        "say so: optimizer.attach(model, whole=True)"
    )
