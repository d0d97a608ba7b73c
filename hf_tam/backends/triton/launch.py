"""How the kernels are launched over a table, and the table that is kept from step to step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hf_tam.backends.tensors import Tensors
from hf_tam.backends.triton.chunks import NUM_WARPS, SUMS_BLOCK
from hf_tam.backends.triton.sums_kernels import combine_kernel, sums_kernel
from hf_tam.backends.triton.table import Chunks, Kind, Table, aligned_grads, key_of

_TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


class Bound(NamedTuple):
    """Tensors with the table that describes them, pointing at the gradients of this step.

    Attributes:
        tensors: What to sum or update.
        table: The table; tensors at `table.outside` cannot be walked by the kernels.
        grads: The gradients pointed at, held until the kernels are launched.
    """

    tensors: Tensors
    table: Table
    grads: list[Tensor]


def bind(tensors: Tensors) -> Bound:
    """Find or build the table of these tensors, and point it at the gradients."""
    grads, kept = aligned_grads(tensors), tensors.memory.kept
    addresses = [grad.data_ptr() if type(grad) is Tensor else 0 for grad in grads]
    key = key_of(tensors, grads, addresses)
    table: Table | None = kept.get("triton")
    if table is None or table.key != key:
        # A graph that was captured with the other one may still be replayed: `tensors.captured` holds it.
        table = kept["triton"] = Table(tensors, key)
    table.refresh(tensors, addresses)
    return Bound(tensors, table, grads)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def compiled_for(kind: Kind, *, block: int) -> dict[str, Any]:
    """The constants that a kernel is compiled with."""
    return {
        "DTYPE": _TYPES[kind.dtype],
        "GRAD_DTYPE": _TYPES[kind.grad_dtype],
        "MOMENT_DTYPE": _TYPES[kind.moment_dtype],
        "CORRECTED": kind.corrected,
        "ALIGNED": kind.aligned,
        "COUPLED": kind.coupled,
        "MAXIMIZE": kind.maximize,
        "BLOCK": block,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,  # Triton 3.10 will no longer fuse by default
    }


def sum_chunks(
    table: Table, kind: Kind, chunks: Chunks, partials: Tensor, scalars: Tensor | None, before: Tensor | None
) -> None:
    """Write the partial sums of some chunks to their rows of `partials`; see `sums_kernel`."""
    sums_kernel[(chunks.size,)](
        table.tensors, table.grads, table.chunk_places, table.numbers, partials, scalars, before, chunks.first,
        len(table.tensors), NUM_SCALARS=0 if scalars is None else len(scalars),
        **compiled_for(kind, block=SUMS_BLOCK),
    )  # fmt: skip


def new_partials(table: Table) -> Tensor:
    """Room for the four partial sums of each chunk."""
    return torch.empty(len(table.chunk_places), 4, dtype=torch.float64, device=table.chunk_places.device)


def combine(table: Table, partials: Tensor, sums: Tensor) -> None:
    """Add up the partial sums of each tensor; 0 for those outside of the kernels."""
    combine_kernel[(len(table.tensors),)](table.tensors, partials, sums, num_warps=NUM_WARPS)
