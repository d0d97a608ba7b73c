"""The Triton backend: two or three launches a step for any number of tensors, with nothing read by the host.

`partial_sums` and `update` are the general path, whatever happens to the sums in between. Where nothing does,
`one_pass` takes the step in two launches. To launch tensors in stretches that stay in the L2 cache between the two
was measured on an H100 (recipes/results/gpu-windows.txt) and took the device longer in every case: the ends of the
launches cost more than the cache gives.

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
from hf_tam.backends.protocol import Report
from hf_tam.backends.tensors import Tensors
from hf_tam.backends.triton.chunks import UPDATE_BLOCK
from hf_tam.backends.triton.launch import bind, combine, compiled_for, new_partials, on, sum_chunks
from hf_tam.backends.triton.step_kernels import REPORTS, adam_step_kernel, sgd_step_kernel
from hf_tam.backends.triton.update_kernels import update_kernel
from hf_tam.update import NUM_SUMS, AdamCoefficients, Coefficients, Scalar

__all__ = ["bind", "one_pass", "partial_sums", "update"]


def partial_sums(tensors: Tensors, *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    bound = bind(tensors)
    table, device = bound.table, bound.table.tensors.device
    partials, sums = new_partials(table), torch.empty(len(tensors), NUM_SUMS, dtype=torch.float64, device=device)
    with on(device):
        for kind, chunks in table.parts.items():
            sum_chunks(table, kind, chunks, partials, None, None)
        combine(table, partials, sums)
    if table.outside:
        others = single.partial_sums(tensors.only(table.outside), with_dot=[True] * len(table.outside))
        for at, row in zip(table.outside, others, strict=True):
            sums[at] = row
    for at, wanted in enumerate(with_dot):
        if not wanted:  # only the host can leave a product out, so this is not the usual case here
            sums[at, :2] = 0.0
            sums[at, 2] = sums[at, 3]
    return sums


def update(
    tensors: Tensors,
    coefficients: Coefficients,
    *,
    keep: Tensor | None = None,
    clip: Scalar | None = None,
    on_host: bool = False,
) -> None:
    """See `Backend.update`. One launch for each kind of tensors; where `keep` is False nothing is read or changed."""
    bound = bind(tensors)
    table, device = bound.table, bound.table.tensors.device
    matrix = torch.stack(list(coefficients)).to(torch.float64)
    keep = None if keep is None else keep.contiguous()  # one flag for all may have a stride of 0
    factor = None if clip is None else torch.as_tensor(clip, dtype=torch.float64, device=device)
    with on(device):
        for kind, chunks in table.parts.items():
            update_kernel[(chunks.size,)](
                table.tensors, table.grads, table.chunk_places, table.numbers, matrix, keep, factor, chunks.first,
                len(tensors), ADAM=isinstance(coefficients, AdamCoefficients),
                **compiled_for(kind, block=UPDATE_BLOCK),
            )  # fmt: skip
    if table.outside:
        places = table.outside
        columns = type(coefficients)(*(torch.stack([column[at] for at in places]) for column in coefficients))
        kept = None if keep is None else torch.stack([keep[at] for at in places])
        single.update(tensors.only(places), columns, keep=kept, clip=factor, on_host=False)
    # Autograd knows nothing of a launch, and would take a saved parameter for unchanged.
    increment_version(tensors.params)


def one_pass(tensors: Tensors, scalars: Tensor, *, skip_nonfinite: bool, skipped: Tensor) -> Report | None:
    """See `Backend.one_pass`. Two launches for each kind of tensors: the sums, then the rest."""
    bound = bind(tensors)
    table, count, device = bound.table, len(tensors), scalars.device
    if table.outside:
        return None
    reports = torch.empty(count, REPORTS, dtype=torch.float64, device=device)
    keeps = torch.empty(count, dtype=torch.uint8, device=device) if skip_nonfinite else None
    partials, before = new_partials(table), torch.empty_like(scalars)
    kernel, lrs = adam_step_kernel if tensors.seconds else sgd_step_kernel, _learning_rates(tensors)
    with on(device):
        for kind, chunks in table.parts.items():
            sum_chunks(table, kind, chunks, partials, scalars, before)
            kernel[(chunks.size,)](
                table.tensors, table.grads, table.chunk_places, table.numbers, lrs, partials, scalars, before, reports,
                keeps, skipped, chunks.first, count, SKIP=skip_nonfinite, **compiled_for(kind, block=UPDATE_BLOCK),
            )  # fmt: skip
    increment_version(tensors.params)
    keep = None if keeps is None else keeps.view(torch.bool)
    return Report(reports[:, :NUM_SUMS], reports[:, NUM_SUMS], reports[:, NUM_SUMS + 1], keep)


def _learning_rates(tensors: Tensors) -> Tensor | None:
    """One for each param group, where there is one that the host does not know."""
    rates, device = [row.lr for row in tensors.numbers], tensors.params[0].device
    if not any(isinstance(rate, Tensor) for rate in rates):
        return None
    if len(rates) == 1 and isinstance(rates[0], Tensor) and rates[0].device == device:
        return rates[0]
    return torch.stack(
        [
            torch.as_tensor(rate, dtype=torch.float64, device=device).reshape(())
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=torch.float64, device=device)
            for rate in rates
        ]
    )
