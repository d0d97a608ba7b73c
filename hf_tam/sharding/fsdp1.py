"""FSDP1 with use_orig_params=True: a rank's parameters are 1-D slices of flat parameters, often empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_tam.sharding.groups import ShardGroups
from hf_tam.sharding.reducer import Reduced, WholeParameters


class Fsdp1Reducer(WholeParameters):
    """Sums over the process group of each parameter's FSDP unit.

    A rank that holds nothing of a parameter takes part with an empty tensor, so that its scalar states advance as the
    others' do.

    Args:
        params: All parameters of the optimizer, in order.
        names: Their names, None where unknown.
        module: The FSDP module, or one that contains it.

    Raises:
        RuntimeError: No module is attached, or it does not own a sliced parameter.
    """

    tells_numbers = True

    def __init__(self, params: Sequence[Tensor], *, names: Sequence[str | None], module: nn.Module | None) -> None:
        """Find each parameter's group. No communication."""
        if module is None:
            raise RuntimeError(
                "FSDP1 keeps only slices of the parameters on each rank, and only the module knows which: call "
                "optimizer.attach(model) with the FSDP model before the first step"
            )
        units = {id(param): (group, name, shape) for param, group, name, shape in _sliced(module)}
        missing = next((p for p in params if getattr(p, "_fsdp_flattened", False) and id(p) not in units), None)
        if missing is not None:
            position = next(position for position, param in enumerate(params) if param is missing)
            raise RuntimeError(
                f"parameter {position} is a slice that FSDP1 made, but the attached {type(module).__name__} does not "
                "own it: call optimizer.attach(model) with the FSDP model that the optimizer was built for"
            )
        groups: list[list[ProcessGroup]] = []
        called, kinds = [], []
        for position, param in enumerate(params):
            group, name, shape = units.get(id(param), (None, names[position], tuple(param.shape)))
            groups.append([] if group is None else [group])
            called.append(name)
            kinds.append(f"{tuple(shape)} {param.dtype}")
        self.groups = ShardGroups(groups, called, kinds)

    def local(self, tensor: Tensor) -> Tensor:
        """The slice itself."""
        return tensor

    def gradient(self, param: Tensor) -> Tensor | None:
        """The slice of the gradient; an empty one where this rank holds nothing of the parameter."""
        if param.grad is None and param.numel() == 0:
            return torch.zeros_like(param)
        return param.grad

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """One all-reduce for each process group of the FSDP units."""
        return self.groups.reduce(sums, rows, present=present)

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """One all-reduce: a checkpoint of FSDP1 restores states on the ranks that hold part of a tensor only."""
        return self.groups.share(numbers())


def _sliced(module: nn.Module) -> Iterator[tuple[Tensor, ProcessGroup | None, str, Sequence[int]]]:
    """Every original parameter below `module` that FSDP1 sliced: itself, its group, its name and its whole shape."""
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None:
            continue
        flat = handle.flat_param
        group = handle.process_group if handle.uses_sharded_strategy else None
        for param, name, shape in zip(flat._params or [], flat._fqns, flat._shapes, strict=True):
            yield param, group, name, shape
