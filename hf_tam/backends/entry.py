"""What a backend is handed: tensors to update, and the numbers to update them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

    def is_current(self, owner: Tensor, state: dict[str, Any] | None, moments: Sequence[str]) -> bool:
        """Whether the parameter and its moments still are the tensors that this entry was made of.

        Only for an entry whose parameter is a whole tensor; of a complex one, which has another view, never.
        """
        param = self.param
        return (
            self.owner is owner
            and state is self.state
            and owner.data_ptr() == param.data_ptr()
            and owner.dtype is param.dtype
            and owner.shape == param.shape
            and owner.stride() == param.stride()
            and state.get(moments[0]) is self.first
            and (self.second is None or state.get(moments[1]) is self.second)
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


@dataclass(slots=True)
class StepScalars:
    """The numbers of one step, one entry a tensor for every name, as the backends want them.

    Attributes:
        coefficients: 1-D tensors of the length of the entries, on their device.
        mask: None where every tensor is updated; otherwise bool, shape (n,), False where the step is skipped and the
            coefficients are those of a step that changes nothing (on the host such tensors are left out instead).
        columns: For each coefficient its values: Python floats on the host, 0-d tensors on an accelerator.
        keep: `mask`, as 0-d tensors.
        clip: The factor on every gradient by which the global norm is clipped: a Python float on the host, a 0-d
            tensor on an accelerator; None where nothing is clipped. The gradients may be left scaled by it.
    """

    coefficients: AdamCoefficients | SgdCoefficients
    mask: Tensor | None
    columns: dict[str, Sequence[Scalar]]
    keep: Sequence[Tensor] | None = None
    clip: Scalar | None = None

    @classmethod
    def on_host(cls, coefficients: AdamCoefficients | SgdCoefficients, *, clip: Tensor | None) -> StepScalars:
        """Python floats. Only for tensors on the CPU: elsewhere this would wait for the device."""
        values: list[list[float]] = torch.stack(list(coefficients)).tolist()
        factor = 1.0 if clip is None else float(clip)
        columns: dict[str, Sequence[Scalar]] = dict(zip(coefficients._fields, values, strict=True))
        return cls(coefficients, None, columns, clip=None if factor == 1.0 else factor)

    @classmethod
    def on_device(
        cls, coefficients: AdamCoefficients | SgdCoefficients, keep: Tensor | None, *, clip: Tensor | None
    ) -> StepScalars:
        """0-d tensors, unread."""
        columns = {name: column.unbind() for name, column in coefficients._asdict().items()}
        return cls(coefficients, keep, columns, None if keep is None else keep.unbind(), clip)

    def only(self, position: int) -> StepScalars:
        """Those of one tensor, on the host."""
        coefficients = type(self.coefficients)(*(column[position : position + 1] for column in self.coefficients))
        columns: dict[str, Sequence[Scalar]] = {name: [column[position]] for name, column in self.columns.items()}
        return StepScalars(coefficients, None, columns, clip=self.clip)

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
