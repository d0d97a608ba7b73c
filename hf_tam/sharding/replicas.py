"""Whether parameters of which every rank says that it holds the whole are the same on every rank.

One that differs is a part of a tensor, or a tensor of this rank alone, that no wrapper has marked as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_tam.integrations.torch_private import is_flat, is_sliced

_SAMPLED = 16
"""Elements of each tensor that are compared: cut or initialised apart, nearly all of them differ."""

_Told = TypeVar("_Told")


def is_plain(param: Tensor) -> bool:
    """Whether nothing about a parameter says that it is a part of a tensor, and it has values."""
    return (
        type(param) in (nn.Parameter, Tensor)
        and not param.is_meta
        and not is_sliced(param)
        and not is_flat(param)
        and not hasattr(param, "ds_tensor")
    )


def compare_replicas(named: Mapping[str, Tensor], *, problem: str | None = None) -> dict[str, str]:
    """Find the parameters of which ranks hold different ones.

    Communication: one all_gather_object of a digest over all ranks, and, only where digests differ, a second one of a
    line for each parameter. Every rank must call.

    Args:
        named: Whole parameters by name, of any device and dtype; 16 elements of each are read.
        problem: Why this rank cannot go on, if it cannot: then every rank raises.

    Returns:
        What differs, by the name of the parameter, the same on every rank. Names that only one rank has are left out.

    Raises:
        ValueError: Some rank has a problem.
    """
    lines = {name: _describe(param) for name, param in named.items()}
    digest = hashlib.sha256(repr(sorted(lines.items())).encode()).hexdigest()
    heads = _gather((digest, problem))
    for rank, (_, told) in enumerate(heads):
        if told is not None:
            raise ValueError(told if told == problem else f"rank {rank}: {told}")
    if len({head for head, _ in heads}) == 1:
        return {}
    everyone = _gather(lines)
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for part in everyone for name in part):
        holders = [(rank, part[name]) for rank, part in enumerate(everyone) if name in part]
        first_rank, first = holders[0]
        for rank, (shape, values) in holders[1:]:
            if (shape, values) != first:
                what = f"{first[0]} and {shape}" if shape != first[0] else f"other values, of shape {shape},"
                found[name] = f"{what} on ranks {first_rank} and {rank}"
                break
    return found


def _describe(param: Tensor) -> tuple[str, str]:
    """Shape and dtype, and a digest of the bits of some elements."""
    kind = f"{tuple(param.shape)} {param.dtype}"
    if not param.numel():
        return kind, ""
    with torch.no_grad():
        whole = param.detach()
        # In float64, since beyond 2^24 fp32 does not hold every place.
        places = torch.linspace(0, param.numel() - 1, min(_SAMPLED, param.numel()), dtype=torch.float64).long()
        places = places.to(param.device)
        # By index: a flat view of a tensor with other strides would be a copy of all of it.
        sample = whole[torch.unravel_index(places, whole.shape)] if whole.ndim else whole.reshape(1)
        bits = torch.view_as_real(sample) if sample.is_complex() else sample
        numbers = bits.contiguous().cpu().view(torch.uint8).flatten().tolist()
    return kind, hashlib.sha256(bytes(numbers)).hexdigest()


def _gather(mine: _Told) -> list[_Told]:
    everyone: list[_Told | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [part for part in everyone if part is not None]
