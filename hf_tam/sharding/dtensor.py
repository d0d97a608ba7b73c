"""DTensor: FSDP2, HSDP, tensor parallelism and their products on meshes of any dimension."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hf_tam.integrations.torch_private import is_strided_shard
from hf_tam.sharding.groups import Reduced, ShardGroups
from hf_tam.sharding.ownership import kind_of
from hf_tam.sharding.reducer import ParameterReducer


class DTensorReducer(ParameterReducer):
    """Sums over every mesh axis on which a parameter is not replicated; replicas are not counted twice.

    Plain tensors beside DTensors (the norms of a tensor-parallel model) are whole.

    Args:
        params: All parameters of the optimizer, in order.
        names: Their names, None where unknown.

    Raises:
        RuntimeError: A placement is neither a shard nor a replica.
    """

    def __init__(self, params: Sequence[Tensor], *, names: Sequence[str | None]) -> None:
        """Find each parameter's groups. No communication."""
        kinds = [kind_of(param) for param in params]
        self.groups = ShardGroups([_shard_groups(param) for param in params], names, kinds)

    def local(self, tensor: Tensor) -> Tensor:
        """The local shard."""
        # All arithmetic is on local tensors: foreach operations on DTensors are planned anew in every step, and leave
        # thousands of objects behind each time (torch 2.12, https://github.com/NVIDIA-NeMo/Automodel/pull/2888).
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gradient(self, param: Tensor) -> Tensor | None:
        """The local shard of the gradient. Redistributes (and so communicates) only where its placements differ.

        Raises:
            RuntimeError: It is on another mesh, where each rank may hold another shard.
        """
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            if grad.device_mesh != param.device_mesh:
                raise RuntimeError(
                    f"a parameter (shape {tuple(param.shape)}) is on {param.device_mesh}, and its gradient on "
                    f"{grad.device_mesh}: bring it to the parameter's mesh before the step"
                )
            # A Partial gradient, for one, is a summand on each rank: the squares of summands do not add up to |g|^2.
            if grad.placements != param.placements:
                grad = grad.redistribute(placements=param.placements)
            return grad.to_local()
        return grad

    def reduce(self, sums: Tensor, rows: Sequence[int], *, present: Sequence[bool]) -> Reduced:
        """One all-reduce for each mesh axis over which anything is cut."""
        return self.groups.reduce(sums, rows, present=present)


def _shard_groups(param: Tensor) -> list[ProcessGroup]:
    return groups_of(param.device_mesh, param.placements) if isinstance(param, DTensor) else []


def groups_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> list[ProcessGroup]:
    """The process groups over which a tensor with these placements is cut. No communication.

    Raises:
        RuntimeError: A placement is neither a shard nor a replica.
    """
    groups = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard) and not is_strided_shard(placement):
            raise RuntimeError(
                f"hf_tam cannot take the angle of a parameter that is placed as {placement!r} on mesh axis {axis}: "
                "parameters must be Shard or Replicate on every axis"
            )
        groups.append(mesh.get_group(axis))
    return groups
