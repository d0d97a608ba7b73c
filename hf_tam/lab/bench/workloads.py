"""Parameter shapes of real Llama-style models. Nothing is trained: a step does not ask where gradients come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

__all__ = ["NAMES", "Workload", "find_workload"]

Shape = tuple[int, ...]

NAMES = ("lora-7b", "full-100m", "full-1b", "many-N", "many-groups")
"""What `find_workload` knows; N is a number of tensors."""

_MANY_SHAPE = (16, 1024)
_GROUP_SHAPE, _NUM_GROUPS = (64, 64), 465
_HIDDEN = "tiny"
"""For the tests of the command itself: it measures nothing."""


@dataclass(frozen=True)
class Workload:
    """Parameters to step.

    Attributes:
        name: As on the command line.
        shapes: One for each parameter tensor.
        grouped: Whether each tensor has a param group of its own, with a learning rate of its own.
    """

    name: str
    shapes: tuple[Shape, ...]
    grouped: bool = False

    @property
    def num_elements(self) -> int:
        """Of all tensors together."""
        return sum(map(prod, self.shapes))

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(prod, self.shapes))


def find_workload(name: str) -> Workload:
    """Return the workload of that name.

    Raises:
        LookupError: There is none.
    """
    if name == "lora-7b":
        return Workload(name, _lora(num_blocks=32, hidden=4096, mlp=11008, rank=16))
    if name == "full-100m":
        return Workload(name, _llama(num_blocks=12, hidden=768, kv=768, mlp=2048, num_words=32_000))
    if name == "full-1b":
        # Llama-3.2-1B: 8 key and value heads of 64; the head shares the embedding's weights.
        return Workload(name, _llama(num_blocks=16, hidden=2048, kv=512, mlp=8192, num_words=128_256))
    if name == _HIDDEN:
        return Workload(name, ((8, 4), (4, 16), (7,), (1,), (0,)))
    if many := re.fullmatch(r"many-([1-9]\d{0,5})", name):
        return Workload(name, (_MANY_SHAPE,) * int(many[1]))
    if groups := re.fullmatch(r"many-groups(?:-([1-9]\d{0,4}))?", name):
        return Workload(name, (_GROUP_SHAPE,) * int(groups[1] or _NUM_GROUPS), grouped=True)
    raise LookupError(f"no workload {name!r}: there are {', '.join(NAMES)} (many-300: 300 tensors of 16 x 1024)")


def _lora(*, num_blocks: int, hidden: int, mlp: int, rank: int) -> tuple[Shape, ...]:
    """A and B of the seven linear layers of every block: attention q, k, v, o, then gate, up and down."""
    layers = [(hidden, hidden)] * 4 + [(hidden, mlp)] * 2 + [(mlp, hidden)]
    block: list[Shape] = []
    for num_in, num_out in layers:
        block += [(rank, num_in), (num_out, rank)]
    return tuple(block) * num_blocks


def _llama(*, num_blocks: int, hidden: int, kv: int, mlp: int, num_words: int) -> tuple[Shape, ...]:
    """All parameters of a Llama whose head is tied to its embedding."""
    attention: list[Shape] = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    block = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    return ((num_words, hidden), *(block * num_blocks), (hidden,))
