"""The compiled CPU backend: all tensors in one call for the sums and one for the update, on torch's number of threads.

A step reads moment and gradient once for the sums, which are taken in fp64, and goes over everything once for the
update: 9 accesses an element where AdamW has 7. Tensors of other dtypes than fp32 and bf16, and those whose parameter,
gradient and moments do not share one dense layout, go to the `cpu` backend. The result does not depend on the number
of threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import cpu
from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.native.library import load, why_not

__all__ = ["BY_WINDOWS", "adam", "is_available", "partial_sums", "sgd", "why_not"]

BY_WINDOWS = False

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def is_available() -> bool:
    """Whether the kernels are compiled, or could be now."""
    return load() is not None


def partial_sums(entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    table = _Table(entries, with_dot)
    rows = torch.empty(len(table.inside), 4, dtype=torch.float64)
    table.call("hf_tam_sums", rows.data_ptr())
    if not table.outside:
        return rows
    sums = torch.empty(len(entries), 4, dtype=torch.float64)
    sums[table.inside] = rows
    others, wanted = [entries[at] for at in table.outside], [with_dot[at] for at in table.outside]
    sums[table.outside] = cpu.partial_sums(others, with_dot=wanted)
    return sums


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    _update("hf_tam_adam", cpu.adam, entries, scalars)


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    _update("hf_tam_sgd", cpu.sgd, entries, scalars)


def _update(
    name: str,
    otherwise: Callable[[Sequence[Entry], StepScalars], None],
    entries: Sequence[Entry],
    scalars: StepScalars,
) -> None:
    table = _Table(entries, repeat(True))
    rows = torch.stack(list(scalars.coefficients), dim=1).double()
    if table.outside:
        rows = rows[table.inside]
    table.call(name, rows.data_ptr(), 1.0 if scalars.clip is None else cast("float", scalars.clip))
    increment_version([entries[at].param for at in table.inside])
    for at in table.outside:
        otherwise([entries[at]], scalars.only(at))


class _Table:
    """The tensors that the kernels are given.

    Attributes:
        inside: Positions of the entries that they can walk.
        outside: Those of the others.
    """

    def __init__(self, entries: Sequence[Entry], with_dot: Iterable[bool]) -> None:
        """Look at the entries."""
        self.inside: list[int] = []
        self.outside: list[int] = []
        self._rows = array("q")  # `tensor` in kernels.c, 64 bits each
        decays = array("d")
        for at, (entry, wanted) in enumerate(zip(entries, with_dot, strict=False)):
            param, grad, layout = entry.param, entry.raw_grad, cpu.layout_of(entry)
            dtype = _DTYPES.get(param.dtype)
            if (
                dtype is None
                or not layout.is_uniform
                or grad.dtype is not param.dtype
                or type(grad) is not Tensor
                or grad.is_neg()
                or not (grad.is_contiguous() if layout.is_contiguous else grad.stride() == param.stride())
            ):
                self.outside.append(at)
                continue
            address, first, second = layout.addresses
            self.inside.append(at)
            decays.append(entry.coupled_decay)
            self._rows.extend(
                (param.numel(), dtype, wanted, entry.maximize, address, grad.data_ptr(), first, second, 0)
            )
        self._rows[8::9] = array("q", decays.tobytes())  # the bits of the doubles

    def call(self, name: str, *arguments: float) -> None:
        """Call a function of kernels.c, without the GIL."""
        library = load()
        assert library is not None
        status = getattr(library, name)(
            self._rows.buffer_info()[0], len(self.inside), torch.get_num_threads(), *arguments
        )
        if status:
            raise MemoryError(f"no memory for the table of the {len(self.inside)} tensors of this step")
