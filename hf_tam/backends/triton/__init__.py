"""The Triton backend: two or three launches a step for any number of tensors, with nothing read by the host.

`partial_sums` and `adam` or `sgd` are the general path, whatever happens to the sums in between. Where nothing does,
`whole_adam` and `whole_sgd` take the step in two launches. To launch tensors in stretches that stay in the L2 cache
between the two was measured on an H100 (recipes/results/gpu-windows.txt) and took the device longer in every case: the
ends of the launches cost more than the cache gives.

Kernels walk raw pointers. Tensors that do not share one dense layout and dtype go to `single`; a gradient in another
memory order than its parameter is copied. fp16 and bf16 are computed in fp32 and rounded once.

Needs a device with fp64, for sums and coefficients. In Triton's interpreter (TRITON_INTERPRET=1) it runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import single
from hf_tam.backends.entry import Entry, StepScalars
from hf_tam.backends.triton.chunks import UPDATE_BLOCK
from hf_tam.backends.triton.launch import Bound, bind, combine, compiled_for, new_partials, on, sum_chunks
from hf_tam.backends.triton.update_kernels import update_kernel
from hf_tam.backends.triton.whole import whole_adam, whole_sgd
from hf_tam.backends.whole import AdamStep, SgdStep, StepReport
from hf_tam.update import AdamCoefficients, Scalar, SgdCoefficients

__all__ = [
    "Bound",
    "adam",
    "bind",
    "partial_sums",
    "sgd",
    "update",
    "whole_adam",
    "whole_sgd",
    "whole_step",
]  # fmt: skip


def partial_sums(entries: Sequence[Entry], *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    bound = bind(entries)
    table = bound.table
    device = table.tensors.device
    partials, sums = new_partials(table), torch.empty(len(entries), 4, dtype=torch.float64, device=device)
    with on(device):
        for kind, chunks in table.parts.items():
            sum_chunks(table, kind, chunks, partials, None, None)
        combine(table, partials, sums)
    for position in table.outside:
        sums[position] = single.partial_sums([entries[position]], with_dot=[True])[0]
    for position, wanted in enumerate(with_dot):
        if not wanted:  # only the host can leave a product out, so this is not the usual case here
            sums[position, :2] = 0.0
            sums[position, 2] = sums[position, 3]
    return sums


def whole_step(
    entries: Sequence[Entry], scalars: Tensor, step: AdamStep | SgdStep, *, skipped: Tensor
) -> StepReport | None:
    """See `Backend.whole_step`."""
    bound = bind(entries)
    if bound.table.outside:
        return None
    if isinstance(step, AdamStep):
        return whole_adam(bound, scalars, step, skipped=skipped)
    return whole_sgd(bound, scalars, step, skipped=skipped)


def adam(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.adam`."""
    update(entries, scalars.coefficients, scalars.mask, _factor(scalars.clip, entries))


def sgd(entries: Sequence[Entry], scalars: StepScalars) -> None:
    """See `Backend.sgd`."""
    update(entries, scalars.coefficients, scalars.mask, _factor(scalars.clip, entries))


def _factor(clip: Scalar | None, entries: Sequence[Entry]) -> Tensor | None:
    return None if clip is None else torch.as_tensor(clip, dtype=torch.float64, device=entries[0].param.device)


def update(
    entries: Sequence[Entry],
    coefficients: AdamCoefficients | SgdCoefficients,
    keep: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """Step every entry: changes parameters and moments in place. One launch for each kind of tensors.

    Args:
        entries: What to update.
        coefficients: See `update.adam_step` and `update.sgd_step`; shape (n,) each, on the entries' device.
        keep: bool, shape (n,); where it is False nothing is read or changed.
        clip: A factor on every gradient, fp64, shape (); the gradients themselves are left as they are.
    """
    bound = bind(entries)
    table = bound.table
    matrix = torch.stack(list(coefficients)).to(torch.float64)
    keep = None if keep is None else keep.contiguous()  # one flag for all may have a stride of 0
    with on(matrix.device):
        for kind, chunks in table.parts.items():
            update_kernel[(chunks.size,)](
                table.tensors, table.grads, table.owners, matrix, keep, clip, chunks.first, len(entries),
                kind.coupled_decay, ADAM=isinstance(coefficients, AdamCoefficients),
                **compiled_for(kind, block=UPDATE_BLOCK),
            )  # fmt: skip
    if table.outside:
        _update_outside([entries[at] for at in table.outside], coefficients, keep, clip, table.outside)
    increment_version([entry.param for entry in entries])


def _update_outside(
    entries: Sequence[Entry],
    coefficients: AdamCoefficients | SgdCoefficients,
    keep: Tensor | None,
    clip: Tensor | None,
    positions: Sequence[int],
) -> None:
    run = single.adam_tensor if isinstance(coefficients, AdamCoefficients) else single.sgd_tensor
    for entry, position in zip(entries, positions, strict=True):
        grad = entry.grad() if clip is None else entry.grad() * clip.to(entry.raw_grad.dtype)
        grad = grad if keep is None else torch.where(keep[position], grad, 0.0)
        run(entry, grad, {name: column[position] for name, column in coefficients._asdict().items()})
