"""The compiled CPU backend, on torch's number of threads; the result does not depend on how many there are.

Where no tensor waits for another the whole step is one call that goes through it tensor by tensor, so that moment and
gradient come from the cache when they are updated: 7 accesses of memory an element, as AdamW has. Otherwise it is two
calls, one for the sums and one for the update: 9.

Tensors of other dtypes than fp32 and bf16, and those whose parameter, gradient and moments do not share one dense
layout, go to the `cpu` backend.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import cpu
from hf_tam.backends.entry import Entry, EntryList, StepScalars
from hf_tam.backends.native.library import load, why_not
from hf_tam.backends.whole import AdamStep, SgdStep, StepReport

__all__ = ["adam", "is_available", "partial_sums", "sgd", "whole_step", "why_not"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_FIELDS = 9


def is_available() -> bool:
    """Whether the kernels are compiled, or could be now."""
    return load() is not None


def partial_sums(entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    table = _table(entries, with_dot)
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


def whole_step(
    entries: Sequence[Entry], scalars: Tensor, step: AdamStep | SgdStep, *, skipped: Tensor
) -> StepReport | None:
    """See `Backend.whole_step`. With `torque_steps` it is not taken whole: afterwards there is no sum to take."""
    table = _table(entries)
    if table.outside or step.torque_steps is not None:
        return None
    settings = [float(step.lr), step.gamma, step.damping_eps, step.literal, step.skip_nonfinite]
    if isinstance(step, AdamStep):
        settings += [True, *step.betas, step.eps, step.weight_decay, 0.0]
    else:
        settings += [False, 0.0, 0.0, 0.0, 0.0, step.momentum]
    numbers, reports = array("d", settings), torch.empty(len(entries), 6, dtype=torch.float64)
    table.call("hf_tam_step", numbers.buffer_info()[0], scalars.data_ptr(), reports.data_ptr())
    increment_version([entry.param for entry in entries])
    sums, cosine, damping = reports[:, :4], reports[:, 4], reports[:, 5]
    keep = None
    if step.skip_nonfinite and not math.isfinite(float(sums[:, 3].sum())):
        keep = sums[:, 3].isfinite()
        skipped.add_((~keep).sum())
    return StepReport(cosine, damping, sums, keep)


def _update(
    name: str,
    otherwise: Callable[[Sequence[Entry], StepScalars], None],
    entries: Sequence[Entry],
    scalars: StepScalars,
) -> None:
    table = _table(entries)
    rows = torch.stack(list(scalars.coefficients), dim=1).double()
    if table.outside:
        rows = rows[table.inside]
    table.call(name, rows.data_ptr(), 1.0 if scalars.clip is None else cast("float", scalars.clip))
    increment_version([entries[at].param for at in table.inside])
    for at in table.outside:
        otherwise([entries[at]], scalars.only(at))


def _table(entries: Sequence[Entry], with_dot: Sequence[bool] | None = None) -> _Table:
    """The table of `entries`, pointing at their gradients; kept where the entries are."""
    kept = entries.kept if isinstance(entries, EntryList) else {}
    table: _Table = kept.get("native") or kept.setdefault("native", _Table(entries))
    table.point_at([entry.raw_grad for entry in entries], with_dot)
    return table


class _Table:
    """The tensors that the kernels are given.

    Attributes:
        inside: Positions of the entries that they can walk.
        outside: Those of the others.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        """Look at all but the gradients."""
        self.inside: Sequence[int] = ()
        self.outside: list[int] = []
        self._dtypes = [entry.param.dtype for entry in entries]
        self._strides = [entry.param.stride() for entry in entries]
        self._fits = [cpu.layout_of(entry).is_uniform and entry.param.dtype in _DTYPES for entry in entries]
        self._all_rows = array("q")  # `tensor` in numbers.h, 64 bits each
        for entry in entries:
            address, first, second = cpu.layout_of(entry).addresses
            dtype = _DTYPES.get(entry.param.dtype, 0)
            decay = array("q", array("d", [entry.coupled_decay]).tobytes())[0]  # the bits of the double
            self._all_rows.extend((entry.param.numel(), dtype, True, entry.maximize, address, 0, first, second, decay))
        self._rows = self._all_rows

    def point_at(self, grads: Sequence[Tensor], with_dot: Sequence[bool] | None) -> None:
        """Find out which gradients the kernels can walk, and where they are.

        Args:
            grads: One for each entry.
            with_dot: Whether its product with the moment is wanted; None: all are.
        """
        if self._fit_all(grads):
            self.inside, self.outside, self._rows = range(len(grads)), [], self._all_rows
        else:
            self.inside = [at for at, grad in enumerate(grads) if self._fits[at] and self._is_walkable(at, grad)]
            self.outside = sorted(set(range(len(grads))) - set(self.inside))
            self._rows = array("q")
            for at in self.inside:
                self._rows.extend(self._all_rows[_FIELDS * at : _FIELDS * (at + 1)])
            grads = [grads[at] for at in self.inside]
        wanted = repeat(True, len(grads)) if with_dot is None else (with_dot[at] for at in self.inside)
        self._rows[2::_FIELDS] = array("q", wanted)
        self._rows[5::_FIELDS] = array("q", map(Tensor.data_ptr, grads))

    def _fit_all(self, grads: Sequence[Tensor]) -> bool:
        return (
            all(self._fits)
            and all(type(grad) is Tensor for grad in grads)
            and [grad.dtype for grad in grads] == self._dtypes
            and list(map(Tensor.stride, grads)) == self._strides
            and not any(map(Tensor.is_neg, grads))
        )

    def _is_walkable(self, at: int, grad: Tensor) -> bool:
        is_alike = grad.dtype == self._dtypes[at] and grad.stride() == self._strides[at]
        return type(grad) is Tensor and is_alike and not grad.is_neg()

    def call(self, name: str, *arguments: float) -> None:
        """Call a function of kernels.c, without the GIL."""
        library = load()
        assert library is not None
        status = getattr(library, name)(
            self._rows.buffer_info()[0], len(self.inside), torch.get_num_threads(), *arguments
        )
        if status:
            raise MemoryError(f"no memory for the table of the {len(self.inside)} tensors of this step")
