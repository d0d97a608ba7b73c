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
class Entry:
    """One logical tensor that has a gradient in this step. Complex tensors appear as their real view.

    Attributes:
        index: Position among all parameters of the optimizer, in param_groups order.
        owner: What stands in `param_groups`, the key of `optimizer.state`: the parameter, or a flat buffer.
        param: Its values, a view that can be written.
        raw_grad: The gradient as the backward pass left it.
        state: The scalar states by name, 0-d: `optimizer.state[owner]`, or views of a buffer's vectors.
        first: The first moment (`exp_avg` or `momentum_buffer`).
        second: The second moment, or None (TAM).
        coupled_decay: Weight decay that belongs to the gradient; 0 for AdaTAMW.
        maximize: Whether the gradient's sign is turned.
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
            param=_real(local(owner.detach())),
            raw_grad=_real(grad.detach()),
            state=state,
            first=held[0],
            second=held[1] if len(held) > 1 else None,
            coupled_decay=decay,
            maximize=maximize,
        )

    def part(self, index: int, start: int, length: int, state: dict[str, Any]) -> Entry:
        """The entry of one logical tensor inside this flat buffer, with scalar states of its own."""

        def narrowed(tensor: Tensor) -> Tensor:
            return tensor.narrow(0, start, length)

        return replace(
            self,
            index=index,
            param=narrowed(self.param),
            raw_grad=narrowed(self.raw_grad),
            state=state,
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
        columns: For each coefficient its values: Python floats on the host, 0-d tensors on an accelerator.
        keep: None where every tensor is updated; otherwise 0-d bool tensors, False where the step is skipped and the
            coefficients are those of a step that changes nothing (on the host such tensors are left out instead).
    """

    columns: dict[str, Sequence[Scalar]]
    keep: Sequence[Tensor] | None = None

    @classmethod
    def on_host(cls, coefficients: AdamCoefficients | SgdCoefficients) -> StepScalars:
        """Python floats. Only for tensors on the CPU: elsewhere this would wait for the device."""
        return cls({name: column.tolist() for name, column in coefficients._asdict().items()})

    @classmethod
    def on_device(cls, coefficients: AdamCoefficients | SgdCoefficients, keep: Tensor | None) -> StepScalars:
        """0-d tensors, unread."""
        columns = {name: column.unbind() for name, column in coefficients._asdict().items()}
        return cls(columns, None if keep is None else keep.unbind())

    def row(self, position: int) -> dict[str, Scalar]:
        """The numbers of one tensor, by name."""
        return {name: column[position] for name, column in self.columns.items()}

    def grad(self, entry: Entry, position: int) -> Tensor:
        """The entry's gradient, zero where the step is skipped: 0 * NaN is NaN, so a weight of 0 is not enough."""
        grad = entry.grad()
        return grad if self.keep is None else torch.where(self.keep[position], grad, 0.0)
