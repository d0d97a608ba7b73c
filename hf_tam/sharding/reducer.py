"""From local partial sums to those of whole logical tensors.

A logical tensor is the parameter as the model defines it. What a rank holds of it is the strategy's business, one file
each; see `select` for the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from hf_tam.sharding.groups import Reduced, ShardGroups


class Span(NamedTuple):
    """What this rank holds of one logical tensor inside a flat buffer.

    Attributes:
        position: The place of the logical tensor among all of the optimizer.
        start: Its first element in the buffer.
        length: How many elements; 0 where other ranks hold it all.
    """

    position: int
    start: int
    length: int


class Reducer(Protocol):
    """Turns the partial sums of what this rank holds into the sums of whole logical tensors."""

    sees_all: bool
    """Whether one call of step() gets every logical tensor that is trained; if not, there is no angle over all."""
    tells_numbers: bool
    """Whether `share` communicates."""

    @property
    def groups(self) -> ShardGroups | None:
        """Over which ranks it sums; None where every tensor is whole."""

    def spans(self, param: Tensor) -> Sequence[Span] | None:
        """The logical tensors in a flat buffer; None where the parameter itself is one."""

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or of its state, a tensor that can be written."""

    def gradient(self, param: Tensor) -> Tensor | None:
        """What this rank holds of the gradient, cut as the parameter is; None where the parameter takes no part."""

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """Make local sums global.

        Args:
            sums: Shape (n, columns), the last column |g|^2 of the raw gradient.
            rows: The position of each of the n tensors among all parameters of the optimizer.
            present: Whether this rank has a gradient of it; not where an empty one stands in.
        """

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """Tell every rank the numbers that go with each logical tensor; None where every rank knows them.

        Args:
            numbers: Gives this rank's, one row a logical tensor of the optimizer, -inf where it knows none.

        Returns:
            The same with the other ranks' numbers in the gaps, -inf where nobody knows any.
        """


class ParameterReducer:
    """What holds wherever each parameter stands for one logical tensor."""

    sees_all = True
    tells_numbers = False

    def spans(self, param: Tensor) -> None:
        """The parameter is a logical tensor itself."""

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """None: every rank has the parameter, however little of it, and with it its numbers."""
        return None


class LocalReducer(ParameterReducer):
    """For whole tensors (one device, DDP): the local sums are the global ones. No communication."""

    groups = None

    def local(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gradient(self, param: Tensor) -> Tensor | None:
        """The gradient itself."""
        return param.grad

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """Return `sums` as they are."""
        return Reduced(sums)
