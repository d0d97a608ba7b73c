"""What a backend is handed: tensors to update, and the numbers to update them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_tam.update import AdamCoefficients, Scalar, SgdCoefficients


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass(slots=True)
class Layout:
    """How the parameter and its moments lie in memory.

    Attributes:
        is_uniform: Whether all are plain tensors of one dtype and one layout that fills a stretch of memory.
        addresses: Where parameter, first and second moment begin (0 where there is none).
        chunks: The first moment in memory order, cut into 1-D pieces, if a backend has asked for them; empty where it
            does not fill a stretch of memory.
    """

    is_uniform: bool
    addresses: tuple[int, int, int]
    chunks: Sequence[Tensor] | None = None


@dataclass(slots=True)
class Entry:
    """One logical tensor that has a gradient in this step. Complex tensors appear as their real view.

    Attributes:
        index: Position among all parameters of the optimizer, in param_groups order.
        owner: What stands in `param_groups`, the key of `optimizer.state`: the parameter, or a flat buffer.
        param: Its values, a view that can be written.
        raw_grad: The gradient as the backward pass left it.
        state: `optimizer.state[owner]`.
        first: The first moment (`exp_avg` or `momentum_buffer`).
        second: The second moment, or None (TAM).
        coupled_decay: Weight decay that belongs to the gradient; 0 for AdaTAMW.
        maximize: Whether the gradient's sign is turned.
        layout: What a backend has found out about the tensors but the gradient, kept while they stay the same.
    """

    index: int
    owner: Tensor
    param: Tensor
    raw_grad: Tensor
    state: dict[str, Any]
    first: Tensor
    second: Tensor | None
    coupled_decay: float
    maximize: bool
    layout: Layout | None = None

    @classmethod
    def of(
        cls,
        index: int,
        owner: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        *,
        local: Callable[[Tensor], Tensor],
        moments: Sequence[str],
        decay: float,
        maximize: bool,
    ) -> Entry:
        """The entry of a parameter whose state exists.

        Args:
            index: Position among all parameters.
            owner: The parameter.
            grad: What this rank holds of its gradient.
            state: `optimizer.state[owner]`.
            local: Gives what this rank holds of the parameter and of its moments.
            moments: State keys of the first and, if there is one, the second moment.
            decay: Coupled weight decay.
            maximize: Whether the gradient's sign is turned.
        """
        held = [_real(local(state[key])) for key in moments]
        return cls(
            index=index,
            owner=owner,
            param=_real(local(owner).detach()),  # in this order: DTensor.detach takes 20 times as long
            raw_grad=_real(grad.detach()),
            state=state,
            first=held[0],
            second=held[1] if len(held) > 1 else None,
            coupled_decay=decay,
            maximize=maximize,
        )

    def part(self, index: int, start: int, length: int) -> Entry:
        """The entry of one logical tensor inside this flat buffer."""

        def narrowed(tensor: Tensor) -> Tensor:
            return tensor.narrow(0, start, length)

        return replace(
            self,
            index=index,
            param=narrowed(self.param),
            raw_grad=narrowed(self.raw_grad),
            first=narrowed(self.first),
            second=None if self.second is None else narrowed(self.second),
        )

    @property
    def has_raw_grad(self) -> bool:
        """Whether the angle and the moments see the gradient as it is."""
        return not self.maximize and self.coupled_decay == 0.0

    def grad(self) -> Tensor:
        """The gradient that the angle and the moments see: sign turned, coupled decay added. A temporary if so."""
        if self.has_raw_grad:
            return self.raw_grad
        grad = self.raw_grad.neg() if self.maximize else self.raw_grad
        return grad.add(self.param, alpha=self.coupled_decay) if self.coupled_decay else grad


class EntryList(list[Entry]):
    """Entries that stay as they are from step to step, but for their gradients.

    Attributes:
        kept: What backends have worked out from all but the gradients, each under its name.
    """

    __slots__ = ("kept",)

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Hold `entries`."""
        super().__init__(entries)
        self.kept: dict[str, Any] = {}


@dataclass
class StepScalars:
    """The numbers of one step, one entry a tensor for every name, as the backends want them.

    Attributes:
        coefficients: 1-D tensors of the length of the entries, on their device.
        mask: None where every tensor is updated; otherwise bool, shape (n,), False where the step is skipped and the
            coefficients are those of a step that changes nothing (on the host such tensors are left out instead).
        clip: The factor on every gradient by which the global norm is clipped: a Python float on the host, a 0-d
            tensor on an accelerator; None where nothing is clipped. The gradients may be left scaled by it.
        is_on_host: Whether all are on the host, where they may be read.
    """

    coefficients: AdamCoefficients | SgdCoefficients
    mask: Tensor | None
    clip: Scalar | None = None
    is_on_host: bool = False

    @classmethod
    def on_host(cls, coefficients: AdamCoefficients | SgdCoefficients, *, clip: Tensor | None) -> StepScalars:
        """Numbers that may be read: only for tensors on the CPU, elsewhere this would wait for the device."""
        factor = 1.0 if clip is None else float(clip)
        return cls(coefficients, None, None if factor == 1.0 else factor, is_on_host=True)

    @classmethod
    def on_device(
        cls, coefficients: AdamCoefficients | SgdCoefficients, keep: Tensor | None, *, clip: Tensor | None
    ) -> StepScalars:
        """Numbers that nobody reads."""
        return cls(coefficients, keep, clip)

    @cached_property
    def columns(self) -> dict[str, Sequence[Scalar]]:
        """For each coefficient its values: Python floats on the host, 0-d tensors on an accelerator."""
        if self.is_on_host:
            return dict(zip(self.coefficients._fields, torch.stack(list(self.coefficients)).tolist(), strict=True))
        return {name: column.unbind() for name, column in self.coefficients._asdict().items()}

    @cached_property
    def keep(self) -> Sequence[Tensor] | None:
        """`mask`, as 0-d tensors."""
        return None if self.mask is None else self.mask.unbind()

    def only(self, position: int) -> StepScalars:
        """Those of one tensor, on the host."""
        coefficients = type(self.coefficients)(*(column[position : position + 1] for column in self.coefficients))
        return StepScalars(coefficients, None, self.clip, is_on_host=True)

    def row(self, position: int) -> dict[str, Scalar]:
        """The numbers of one tensor, by name."""
        return {name: column[position] for name, column in self.columns.items()}

    def grad(self, entry: Entry, position: int) -> Tensor:
        """The entry's gradient, clipped; zero where the step is skipped: 0 * NaN is NaN, a weight of 0 not enough."""
        grad = self.clipped(entry.grad())
        return grad if self.keep is None else torch.where(self.keep[position], grad, 0.0)

    def clipped(self, grad: Tensor) -> Tensor:
        """The gradient times the clipping factor, in fp32 at least."""
        if self.clip is None:
            return grad
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return grad * (self.clip.to(grad.dtype) if isinstance(self.clip, Tensor) else self.clip)
