"""FSDP1 with use_orig_params=True: a rank's parameters are 1-D slices of flat parameters, often empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_tam.integrations.torch_private import flat_parts, is_sliced
from hf_tam.sharding.dtensor import groups_of
from hf_tam.sharding.groups import Reduced, ShardGroups
from hf_tam.sharding.reducer import ParameterReducer


class Fsdp1Reducer(ParameterReducer):
    """Sums over the process group of each parameter's FSDP unit, and over those of tensor parallelism below it.

    A rank that holds nothing of a parameter takes part with an empty tensor, so that its scalar states advance as the
    others' do.

    Args:
        params: All parameters of the optimizer, in order.
        names: Their names, None where unknown.
        modules: The FSDP modules, or modules that contain them.

    Raises:
        RuntimeError: No module is attached, or none owns a sliced parameter.
    """

    tells_numbers = True

    def __init__(self, params: Sequence[Tensor], *, names: Sequence[str | None], modules: Sequence[nn.Module]) -> None:
        """Find each parameter's groups. No communication."""
        if not modules:
            raise RuntimeError(
                "FSDP1 keeps only slices of the parameters on each rank, and only the module knows which: call "
                "optimizer.attach(model) with the FSDP model, which must live on, before the first step"
            )
        # By identity, which FSDP1 leaves the parameters when it cuts them; their names are those of a unit alone.
        slices = {id(original.param): original for module in modules for original in _sliced(module)}
        groups: list[Sequence[ProcessGroup]] = []
        called: list[str | None] = []
        kinds = []
        for position, param in enumerate(params):
            original = slices.get(id(param))
            name, shape = names[position], tuple(param.shape)
            if original is not None:
                name, shape = name or original.name, original.shape
            elif is_sliced(param):
                attached = " and ".join(type(module).__name__ for module in modules)
                raise RuntimeError(
                    f"parameter {name or position} is a slice that FSDP1 made, but no attached module ({attached}) "
                    "owns it: call optimizer.attach(model) with the FSDP model that it belongs to, too"
                )
            groups.append([] if original is None else original.groups)
            called.append(name)
            kinds.append(f"{shape} {param.dtype}")
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


class _Slice(NamedTuple):
    """A parameter of which FSDP1 keeps a slice here.

    Attributes:
        param: The parameter itself.
        groups: The process groups over which it is cut.
        name: What it is called in its FSDP unit.
        shape: Its whole shape.
    """

    param: Tensor
    groups: Sequence[ProcessGroup]
    name: str
    shape: tuple[int, ...]


def _sliced(module: nn.Module) -> Iterator[_Slice]:
    """Every original parameter below `module` that FSDP1 sliced."""
    for part in flat_parts(module):
        own = [] if part.group is None else [part.group]
        if part.below is None:
            yield _Slice(part.param, own, part.name, part.shape)
        else:  # what FSDP1 cut was the local shard of a DTensor
            below = part.below
            yield _Slice(part.param, [*own, *groups_of(below.mesh, below.placements)], part.name, tuple(below.shape))
