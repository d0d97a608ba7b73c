"""What an optimizer is about to step, as it is told to other ranks."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_tam import update
from hf_tam.hyperparameters import HYPERPARAMETERS
from hf_tam.sharding.ownership import device_of, kind_of
from hf_tam.sharding.reducer import ParameterReducer, Reducer
from hf_tam.sharding.terms import DECAYS, LOADED, Row, Shared, Terms

__all__ = ["Stepped", "digest", "no_sums"]

# What no schedule moves: what is communicated, and what all ranks make of the sums, so that a tensor has one torque.
_COMPARED = tuple(name for name, known in HYPERPARAMETERS.items() if known.is_agreed)
_SAMPLES = 256
"""Elements by which a tensor is known again."""


class Stepped(NamedTuple):
    """What an optimizer is about to step.

    Attributes:
        reducer: How its parameters are kept.
        groups: Its param groups.
        coupled: Whether weight decay is part of the gradient.
        loaded: Whether a state was loaded since the last step.
        fresh: Whether it has no state yet.
    """

    reducer: Reducer
    groups: Sequence[Mapping[str, Any]]
    coupled: bool
    loaded: bool
    fresh: bool

    @property
    def params(self) -> list[Tensor]:
        """What stands in the param groups."""
        return list(chain.from_iterable(group["params"] for group in self.groups))

    @property
    def is_partitioned(self) -> bool:
        """Whether that is a part of the buffers of DeepSpeed ZeRO."""
        return not isinstance(self.reducer, ParameterReducer)

    @property
    def tells(self) -> bool:
        """Whether the numbers of a loaded state are told in this step."""
        return self.loaded and self.reducer.tells_numbers

    @property
    def takes_all(self) -> bool:
        """Whether anything is taken over all parameters together."""
        return any(group["scope"] == "model" or group["max_grad_norm"] is not None for group in self.groups)

    @property
    def decays_first(self) -> bool:
        """Whether clipping takes a reduction of its own."""
        clips = any(group["max_grad_norm"] is not None for group in self.groups)
        return clips and self.coupled and any(group["weight_decay"] for group in self.groups)

    def steering(self) -> object:
        """What no rank may change alone."""
        return [tuple(map(group.__getitem__, _COMPARED)) for group in self.groups], self.decays_first

    def options(self) -> list[dict[str, Any]]:
        """The compared hyperparameters, each combination once."""
        found: list[dict[str, Any]] = []
        for group in self.groups:
            options = {key: _plain(group[key]) for key in _COMPARED}
            if options not in found:
                found.append(options)
        return found

    def rows(self) -> list[Row]:
        """Every logical tensor."""
        options = [{key: _plain(group[key]) for key in _COMPARED} for group in self.groups for _ in group["params"]]
        cut = self.reducer.groups
        if cut is None:
            return [Row(None, kind_of(param), some) for param, some in zip(self.params, options, strict=True)]
        if self.is_partitioned:  # the buffers of one param group
            options = options[:1] * len(cut.kinds)
        return [Row(*row) for row in zip(cut.names, cut.kinds, options, strict=True)]

    def layout(self, rows: Sequence[Row]) -> object:
        """What must be compared anew when it is another."""
        cut = self.reducer.groups
        where = {} if cut is None else {group.group_name: tuple(held) for group, held in cut.rows.items()}
        return [(row.kind, row.options) for row in rows], where, self.decays_first

    def terms(self, rows: Sequence[Row]) -> Terms:
        """What is told to those who hold other parts of the same tensors."""
        cut = self.reducer.groups
        shared = {
            str(group.group_name): Shared(dist.get_process_group_ranks(group), [rows[index] for index in held])
            for group, held in ({} if cut is None else cut.rows).items()
        }
        return Terms(shared, {LOADED: self.tells, DECAYS: self.decays_first})

    def values(self) -> str:
        """A digest of the parameters that this rank holds whole; empty where steps have made them what they are.

        The order is left out. Reads some elements of each, and so waits for an accelerator.
        """
        if not self.fresh:
            return ""
        cut = self.reducer.groups
        indices = set() if cut is None else set(chain.from_iterable(cut.rows.values()))
        whole = [param for index, param in enumerate(self.params) if index not in indices]
        return digest(f"{kind_of(param)} {self._sample(param).tolist()}".encode() for param in whole)

    def gradients(self) -> list[tuple[str, float]]:
        """A digest and the norm of every gradient that says anything, of some elements, where all tensors are whole.

        Waits for an accelerator, as `values`.
        """
        found = []
        for param in self.params if self.reducer.groups is None else ():
            if param.grad is not None and not param.grad.is_sparse:
                sample = self._sample(param.grad)
                # Zeros are the same on ranks that hold different tensors, and NaN is not equal to itself.
                if sample.any() and sample.isfinite().all():
                    told = digest([f"{kind_of(param)} {sample.tolist()}".encode()])[:16]
                    found.append((told, sample.norm().item()))
        return found

    def _sample(self, tensor: Tensor) -> Tensor:
        """Some elements, in float64 on the host."""
        local = self.reducer.local(tensor.detach())
        elements = local.reshape(-1)[:: max(1, local.numel() // _SAMPLES)]
        return (torch.view_as_real(elements) if elements.is_complex() else elements).to("cpu", torch.float64)

    def no_sums(self) -> Tensor:
        """The sums of no tensor, as they will be in the step, and on the same device."""
        return no_sums(self.params)


def no_sums(params: Sequence[Tensor]) -> Tensor:
    """Shape (0, 4), on the device of the parameters and in its dtype of sums."""
    device = device_of(params)
    return torch.zeros(0, update.NUM_SUMS, dtype=update.accumulator_dtype(device), device=device)


def digest(parts: Iterable[bytes]) -> str:
    """One of all parts, whatever their order."""
    hashes = sorted(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's, to be written to the store."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)) else value
