"""Refuses models that say of themselves that their parameters are parts of tensors, where nothing else tells."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_CUT = ("colwise", "rowwise", "grouped_gemm", "experts")
"""Parts of the names of transformers' parallel styles under which a rank keeps a part of a parameter."""


def refuse_plain_shards(module: nn.Module) -> None:
    """Refuse a tensor-parallel model whose parameters are plain tensors: each rank's own part, not marked as one.

    transformers 5.2 to 5.15 makes them so; from 5.16 on they are DTensors, which say how they are cut. What is relied
    on: `_tp_size` of the model, `tp_plan` (names, with * for numbers, and styles), `_hf_tp_plan` of the modules that
    were cut, and `_device_mesh`. No communication.

    Args:
        module: A model, or anything that contains one.

    Raises:
        ValueError: It does, or contains one that does.
    """
    for owner in module.modules():
        size = getattr(owner, "_tp_size", None)
        if not isinstance(size, int) or size < 2:
            continue
        planned = dict(_planned(owner))
        if planned and not any(_is_cut_over(param, owner) for param in planned.values()):
            name, param = next(iter(planned.items()))
            raise ValueError(
                f"{type(owner).__name__} is tensor-parallel over {size} ranks, and {name} (here {tuple(param.shape)}) "
                "is this rank's part of it as a plain tensor: hf_tam would take the angle of each part. Use "
                "transformers>=5.16, where such parameters are DTensors, or no tensor parallelism"
            )


def _planned(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that the plan of a model cuts, by name."""
    plan = getattr(owner, "tp_plan", None) or getattr(owner, "_tp_plan", None) or {}
    for path, module in owner.named_modules():
        for name, param in module.named_parameters(path, recurse=False):
            known = re.sub(r"\d+", "*", name.replace(".base_layer.", "."))  # peft puts that in
            style = getattr(module, "_hf_tp_plan", None) or plan.get(known) or plan.get(known.rpartition(".")[0])
            if isinstance(style, str) and any(part in style for part in _CUT):
                yield name, param


def _is_cut_over(param: Tensor, owner: nn.Module) -> bool:
    """Whether a parameter is a DTensor, and of a mesh that holds the tensor-parallel ranks: FSDP2 makes others."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    if not isinstance(param, DTensor):
        return False
    mesh, own = getattr(owner, "_device_mesh", None), param.device_mesh
    if mesh is None or mesh.ndim > 1 or "tp" in (own.mesh_dim_names or ()):
        return True
    return set(mesh.mesh.flatten().tolist()) <= set(own.mesh.flatten().tolist())
