"""DeepSpeed ZeRO: a rank's optimizer steps flat fp32 buffers with many logical tensors in each, cut anywhere.

DeepSpeed leaves the way to its partition map on the user's parameters, see `hf_tam.integrations.deepspeed.partitions`,
and on ZeRO-3's parameters `ds_numel` and `partition_numel()`; nothing else of it is relied on. The map is believed
only if the fragments of all ranks together cover every logical tensor once, and hold its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_tam.integrations.deepspeed import partitions
from hf_tam.sharding.groups import Reduced, ShardGroups
from hf_tam.sharding.reducer import Span


class _Fragment(NamedTuple):
    """What one rank holds of a logical tensor: which, where in the tensor, where in the buffer, how much of it.

    `matches` says whether the buffer holds the parameter's own values there, as it must before the first step.
    """

    position: int
    offset: int
    start: int
    length: int
    matches: bool


class ZeroReducer:
    """Sums over the data-parallel group, for the buffers of one call of step().

    Every rank advances the scalar states of every logical tensor of a buffer, also of those it holds nothing of.

    Args:
        buffers: The flat buffers that stand in `param_groups` during this call.
        owned: The parameters that the optimizer was built with, in order: the logical tensors. None for those that no
            attached module has.
        names: Their names, None where unknown.
        shapes: Their shapes when the optimizer was built, None where unknown.

    Raises:
        RuntimeError: A buffer's partition map is not known or has gaps, or other ranks split the model further; or a
            logical tensor is missing.
    """

    tells_numbers = False

    def __init__(
        self,
        buffers: Sequence[Tensor],
        owned: Sequence[Tensor | None],
        *,
        names: Sequence[str | None],
        shapes: Sequence[tuple[int, ...] | None],
    ) -> None:
        """Find what lies where in the buffers.

        Communication: one all_gather_object for each buffer.
        """
        _require_all(owned, names, shapes)
        group = _data_parallel_group(owned)
        self._spans = {id(buffer): _spans(buffer, owned, group) for buffer in buffers}
        held = {span.position for spans in self._spans.values() for span in spans}
        self.sees_all = held >= {
            index for index, param in enumerate(owned) if partitions.is_optimized(param) and _numel(param)
        }
        self.groups = ShardGroups(
            [[group] if index in held else [] for index in range(len(owned))],
            names,
            [str(_shape(param)) for param in owned],
        )

    def local(self, tensor: Tensor) -> Tensor:
        """The buffer itself."""
        return tensor

    def gradient(self, param: Tensor) -> Tensor | None:
        """The gradient of the whole buffer, which DeepSpeed fills with zeros where a tensor has none."""
        # Not so under ZeRO-3 and with offloading: there a tensor without a gradient keeps its last one, with any
        # optimizer (deepspeed 0.19).
        return param.grad

    def spans(self, param: Tensor) -> Sequence[Span]:
        """The logical tensors in a buffer."""
        return self._spans[id(param)]

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """One all-reduce over the data-parallel group, of the rows of this call's buffers."""
        return self.groups.reduce(sums, rows, present=present)

    def share(self, numbers: Callable[[], Tensor]) -> Tensor | None:
        """None: every rank has the numbers of every logical tensor of a buffer."""
        return None


def _require_all(
    owned: Sequence[Tensor | None], names: Sequence[str | None], shapes: Sequence[tuple[int, ...] | None]
) -> None:
    """The way to a tensor's place in the buffers begins at the parameter, and only a module holds that by now."""
    for position, (param, name, shape) in enumerate(zip(owned, names, shapes, strict=True)):
        if param is None and 0 not in (shape or ()):
            raise RuntimeError(
                f"parameter {name or position} (shape {shape}) was given to the optimizer, and no attached module "
                "owns it, so its place in DeepSpeed's buffers cannot be found: call optimizer.attach(module), before "
                "deepspeed.initialize, with a module that owns every parameter of the optimizer"
            )


def _data_parallel_group(owned: Sequence[Tensor | None]) -> ProcessGroup:
    groups: list[ProcessGroup] = [
        partitions.data_parallel_group(param)
        for param in owned
        if param is not None and partitions.is_optimized(param)
    ]
    sizes = {dist.get_world_size(group) for group in groups}
    if sizes != {dist.get_world_size()}:
        raise RuntimeError(
            f"DeepSpeed partitions parameters over {sorted(sizes)} of {dist.get_world_size()} ranks: something else "
            "(MiCS, tensor, pipeline or expert parallelism) cuts or replicates them too, and hf_tam cannot take the "
            "angle of whole tensors: use plain ZeRO over all ranks, or --optim adamw_torch"
        )
    return groups[0]


def _spans(buffer: Tensor, owned: Sequence[Tensor | None], group: ProcessGroup) -> list[Span]:
    """Where each logical tensor of a buffer lies in it, in the order of the logical tensors; length 0: elsewhere."""
    mine = _own_fragments(buffer, owned, group)
    everyone: list[list[_Fragment]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, mine, group=group)
    fragments: dict[int, list[_Fragment]] = {}
    for fragment in (fragment for part in everyone for fragment in part):
        fragments.setdefault(fragment.position, []).append(fragment)
    if not fragments:
        raise RuntimeError(
            f"DeepSpeed steps a buffer of {buffer.numel()} elements that no parameter of this optimizer leads to: "
            "build the optimizer with the parameters of the very model that is given to DeepSpeed"
        )
    for position, parts in sorted(fragments.items()):
        _require_cover(position, owned[position], parts)
        _require_values(position, owned[position], parts)
    own = {fragment.position: fragment for fragment in mine}
    return [
        Span(position, own[position].start, own[position].length) if position in own else Span(position, 0, 0)
        for position in sorted(fragments)
    ]


def _own_fragments(buffer: Tensor, owned: Sequence[Tensor | None], group: ProcessGroup) -> list[_Fragment]:
    stage3 = partitions.stage3_optimizer(owned)
    if stage3 is not None:
        return _stage3_fragments(buffer, owned, stage3.fp16_groups, stage3.fp32_partitioned_groups_flat, group)
    # `hp_fragment` is a view of the buffer that it belongs to.
    memory = buffer.untyped_storage().data_ptr()
    fragments = []
    for position, param in enumerate(owned):
        mapping = partitions.fragment(param)
        if param is not None and mapping is not None and mapping.hp_fragment.untyped_storage().data_ptr() == memory:
            place, origin = mapping.hp_fragment_address, mapping.lp_fragment_address
            matches = _holds(buffer, place.start, param.detach().flatten()[origin.start :][: place.numel])
            fragments.append(_Fragment(position, origin.start, place.start, place.numel, matches))
    return fragments


def _stage3_fragments(
    buffer: Tensor,
    owned: Sequence[Tensor | None],
    sub_groups: Sequence[Sequence[Tensor]],
    buffers: Sequence[Tensor],
    group: ProcessGroup,
) -> list[_Fragment]:
    """ZeRO-3 cuts every tensor into equal parts, pads the last ones, and lays a sub-group's parts side by side."""
    params: Sequence[Any] = next(
        (params for params, flat in zip(sub_groups, buffers, strict=True) if flat is buffer), []
    )
    positions = {id(param): position for position, param in enumerate(owned) if param is not None}
    rank, start, fragments = dist.get_rank(group), 0, []
    for param in params:
        if id(param) not in positions:
            raise RuntimeError(
                f"DeepSpeed optimizes a parameter {_shape(param)} that this optimizer was not built with: build the "
                "optimizer with the parameters of the very model that is given to DeepSpeed"
            )
        part = param.partition_numel()
        offset = min(rank * part, param.ds_numel)
        length = min(part, param.ds_numel - offset)
        if length > 0:
            matches = _holds(buffer, start, param.ds_tensor.detach().flatten()[:length])
            fragments.append(_Fragment(positions[id(param)], offset, start, length, matches))
        start += part
    return fragments


def _holds(buffer: Tensor, start: int, values: Tensor) -> bool:
    # The buffer is fp32, which DeepSpeed has made of a parameter in bf16 perhaps: rounded back, it must be that again.
    # And it may be offloaded to the CPU.
    held = buffer.detach()[start : start + values.numel()]
    return torch.equal(held.to(values.dtype), values.to(held.device))


def _require_values(position: int, param: Tensor | None, parts: list[_Fragment]) -> None:
    """With round_robin_gradients the buffer has another order than the map (seen in deepspeed 0.19)."""
    if not all(part.matches for part in parts):
        raise RuntimeError(
            f"DeepSpeed's buffer does not hold parameter {position} {_shape(param)} where its partition map says, and "
            'hf_tam would take the angle of other tensors: remove "round_robin_gradients" from the DeepSpeed '
            "configuration, and give the model its weights before DeepSpeed wraps it"
        )


def _require_cover(position: int, param: Tensor | None, parts: list[_Fragment]) -> None:
    expected, covered = _numel(param), 0
    for part in sorted(parts, key=lambda part: part.offset):
        if part.offset != covered:
            break
        covered += part.length
    if covered != expected:
        raise RuntimeError(
            f"DeepSpeed's partition map does not cover parameter {position} {_shape(param)}: {covered} of {expected} "
            "elements follow one another over the ranks. hf_tam takes the angle of whole tensors only; report this "
            "with the DeepSpeed version and configuration, or use --optim adamw_torch"
        )


def _numel(param: Tensor | None) -> int:
    """Elements of the logical tensor; under ZeRO-3 the parameter itself is empty between uses."""
    return 0 if param is None else int(getattr(param, "ds_numel", param.numel()))


def _shape(param: Tensor | None) -> tuple[int, ...]:
    return () if param is None else tuple(getattr(param, "ds_shape", param.shape))
