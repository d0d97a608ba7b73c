"""The compiled CPU backend, on torch's number of threads; the result does not depend on how many there are.

Where no tensor waits for another the whole step is one call that goes through it tensor by tensor, so that moment and
gradient come from the cache when they are updated: 7 accesses of memory an element, as AdamW has. Otherwise it is two
calls, one for the sums and one for the update: 9.

Tensors of other dtypes than fp32 and bf16, and those whose parameter, gradient and moments do not share one dense
layout, go to the `cpu` backend.
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
from hf_tam.backends.windows import AdamStep, SgdStep, WindowReport

__all__ = ["adam", "is_available", "partial_sums", "sgd", "step_by_windows", "why_not"]

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


def step_by_windows(
    entries: Sequence[Entry], scalars: Tensor, step: AdamStep | SgdStep, *, skipped: Tensor
) -> WindowReport | None:
    """See `Backend.step_by_windows`. With `torque_steps` it is not taken whole: afterwards there is no sum to take."""
    table = _Table(entries, repeat(True))
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
    if step.skip_nonfinite:
        skipped.add_((~sums[:, 3].isfinite()).sum())
    return WindowReport(cosine, damping, sums)


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
            param, grad = entry.param, entry.raw_grad
            if not cpu.fits_kernel(entry, grad, dtypes=_DTYPES) or type(grad) is not Tensor or grad.is_neg():
                self.outside.append(at)
                continue
            address, first, second = cpu.layout_of(entry).addresses
            self.inside.append(at)
            decays.append(entry.coupled_decay)
            numbers = (param.numel(), _DTYPES[param.dtype], wanted, entry.maximize)
            self._rows.extend((*numbers, address, grad.data_ptr(), first, second, 0))
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
