"""How the kernels are launched over a table, and the tables that are kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_tam.backends.entry import Entry, EntryList
from hf_tam.backends.triton.chunks import NUM_WARPS, SUMS_BLOCK
from hf_tam.backends.triton.sums_kernels import combine_kernel, sums_kernel
from hf_tam.backends.triton.table import Chunks, Kind, Table, aligned_grad

_TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip
_TABLES: Any = WeakIdKeyDictionary()
"""For each parameter that comes first in a bucket: the bucket's tables, the current ones last."""


class Bound(NamedTuple):
    """Entries with the tables that describe them, pointing at the gradients of this step.

    Attributes:
        entries: What to sum or update.
        table: The tables; entries at `table.outside` cannot be walked by the kernels.
        grads: The gradients pointed at, held until the kernels are launched.
    """

    entries: Sequence[Entry]
    table: Table
    grads: list[Tensor]


def bind(entries: Sequence[Entry]) -> Bound:
    """Find or build the tables of these entries, all on one device, and point them at the gradients."""
    kept = entries.kept if isinstance(entries, EntryList) else {}
    table: Table | None = kept.get("triton")
    if table is not None:
        grads = [entry.raw_grad for entry in entries]
        addresses = list(map(Tensor.data_ptr, grads))
        if table.takes(grads, addresses):
            table.refresh(addresses)
            return Bound(entries, table, grads)
    grads = [aligned_grad(entry) for entry in entries]
    tables = _TABLES.setdefault(entries[0].owner, [])
    if tables and tables[-1].fits(entries, grads):
        tables[-1].refresh([grad.data_ptr() for grad in grads])
    else:
        # A graph that was captured with other tables may still be replayed.
        tables[:] = [table for table in tables if table.is_captured]
        tables.append(Table(entries, grads))
    kept["triton"] = tables[-1]
    return Bound(entries, tables[-1], grads)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be the tensors'."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def compiled_for(kind: Kind, *, block: int) -> dict[str, Any]:
    """The constants that a kernel is compiled with."""
    return {
        "DTYPE": _TYPES[kind.dtype],
        "GRAD_DTYPE": _TYPES[kind.grad_dtype],
        "ALIGNED": kind.aligned,
        "COUPLED": kind.coupled_decay != 0.0,
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
        table.tensors, table.grads, table.owners, partials, scalars, before, chunks.first, len(table.tensors),
        kind.coupled_decay, NUM_SCALARS=0 if scalars is None else len(scalars),
        **compiled_for(kind, block=SUMS_BLOCK),
    )  # fmt: skip


def new_partials(table: Table) -> Tensor:
    """Room for the four partial sums of each chunk."""
    return torch.empty(len(table.owners), 4, dtype=torch.float64, device=table.owners.device)


def combine(table: Table, partials: Tensor, sums: Tensor) -> None:
    """Add up the partial sums of each tensor; 0 for those outside of the kernels."""
    combine_kernel[(len(table.tensors),)](table.tensors, partials, sums, num_warps=NUM_WARPS)
