"""What a step asks of a backend. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from hf_tam.backends.tensors import Tensors
from hf_tam.update import Coefficients, Scalar


class Report(NamedTuple):
    """What a backend saw that took a whole step; fp64, on the device.

    Attributes:
        sums: <m, g>, |m|^2, |g|^2 and the raw |g|^2, shape (n, 4).
        cosine: s_t, shape (n,).
        damping: The damping applied, shape (n,).
        keep: False where the tensor was left out, shape (n,) bool; None where none was.
    """

    sums: Tensor
    cosine: Tensor
    damping: Tensor
    keep: Tensor | None


class OnePass(Protocol):
    """Takes the whole step where no tensor waits for another: sums, angles and update, tensor by tensor."""

    def __call__(self, tensors: Tensors, scalars: Tensor, *, skip_nonfinite: bool, skipped: Tensor) -> Report | None:
        """Take it.

        That is with scope "tensor", nothing sharded, no clipping, and `nonfinite` "skip" or "propagate". Then a tensor
        is updated while the cache still holds what its sums have read.

        Args:
            tensors: n tensors.
            scalars: Their scalar states as they lie in the optimizer's state, fp32, one row a state; written to.
            skip_nonfinite: Whether a tensor with a NaN or Inf gradient is left out (`nonfinite="skip"`).
            skipped: 0-d int64; the number of tensors left out is added to it.

        Returns:
            What was seen, or None, with nothing done, where the backend cannot take the step of all these tensors.
        """


class Backend(Protocol):
    """What a step needs of a backend."""

    @property
    def one_pass(self) -> OnePass | None:
        """None where every step is taken in parts."""

    def partial_sums(self, tensors: Tensors, *, with_dot: Sequence[bool]) -> Tensor:
        """The rows <m, g>, |m|^2, |g|^2 and raw |g|^2 of each tensor.

        Returns:
            Shape (n, 4), `accumulator_dtype`. Where `with_dot` is False the first two columns are 0.
        """

    def update(
        self,
        tensors: Tensors,
        coefficients: Coefficients,
        *,
        keep: Tensor | None,
        clip: Scalar | None,
        on_host: bool,
    ) -> None:
        """`update.adam_step` or `update.sgd_step` for every tensor.

        Args:
            tensors: What is updated.
            coefficients: Their numbers, shape (n,) each.
            keep: None where every tensor is updated; otherwise bool, shape (n,), False where the step is skipped and
                the coefficients are those of a step that changes nothing (on the host such tensors are left out
                instead).
            clip: The factor on every gradient: a float on the host, a 0-d tensor elsewhere; None where there is none.
                The gradients may be left scaled by it.
            on_host: Whether numbers may be read, on the CPU.
        """
