"""The compiled CPU backend, on torch's number of threads; the result does not depend on how many there are.

Where no tensor waits for another the whole step is one call that goes through it tensor by tensor, so that moment and
gradient come from the cache when they are updated: 7 accesses of memory an element, as AdamW has. Otherwise it is two
calls, one for the sums and one for the update: 9.

Tensors of other dtypes than fp32 and bf16 (whose moments may be fp32), and those whose parameter, gradient and states
do not share one dense layout, go to the `torch_fused` backend.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_tam.backends import torch_fused
from hf_tam.backends.native.library import load, why_not
from hf_tam.backends.protocol import Report
from hf_tam.backends.tensors import Tensors
from hf_tam.update import NUM_SUMS, AdamCoefficients, Coefficients, Scalar

__all__ = ["is_available", "one_pass", "partial_sums", "update", "why_not"]

# The dtypes of parameter and moments, and the kinds of numbers.h: with a correction, and without.
_KINDS = {
    (torch.float32, torch.float32): (0, 0),
    (torch.bfloat16, torch.bfloat16): (2, 1),
    (torch.bfloat16, torch.float32): (4, 3),
}
_FIELDS = 11
_REPORTS = 6


def is_available() -> bool:
    """Whether the kernels are compiled, or could be now."""
    return load() is not None


def partial_sums(tensors: Tensors, *, with_dot: Sequence[bool]) -> Tensor:
    """See `Backend.partial_sums`."""
    inside = tensors.walkable(_KINDS)
    if inside is None:
        return _sums(tensors, with_dot)
    sums = torch.empty(len(tensors), NUM_SUMS, dtype=torch.float64, device="cpu")
    for places, take in ((list(inside), _sums), (_others(tensors, inside), _cpu_sums)):
        if places:
            sums[places] = take(tensors.only(places), [with_dot[at] for at in places])
    return sums


def _cpu_sums(tensors: Tensors, with_dot: Sequence[bool]) -> Tensor:
    return torch_fused.partial_sums(tensors, with_dot=with_dot)


def _sums(tensors: Tensors, with_dot: Sequence[bool]) -> Tensor:
    # The device is named here and below: under a default device of the user's (torch.set_default_device) the kernels
    # would write to an address that is not the host's.
    rows = torch.empty(len(tensors), NUM_SUMS, dtype=torch.float64, device="cpu")
    _call("hf_tam_sums", _table(tensors, with_dot), len(tensors), rows.data_ptr())
    return rows


def update(
    tensors: Tensors, coefficients: Coefficients, *, keep: Tensor | None, clip: Scalar | None, on_host: bool
) -> None:
    """See `Backend.update`; always on the host."""
    assert on_host
    assert keep is None
    assert not isinstance(clip, Tensor)
    inside = tensors.walkable(_KINDS)
    if inside is None:
        _update(tensors, coefficients, clip)
        return
    if inside:
        _update(tensors.only(inside), _only(coefficients, inside), clip)
    others = _others(tensors, inside)
    torch_fused.update(tensors.only(others), _only(coefficients, others), keep=None, clip=clip, on_host=True)


def _update(tensors: Tensors, coefficients: Coefficients, clip: float | None) -> None:
    name = "hf_tam_adam" if isinstance(coefficients, AdamCoefficients) else "hf_tam_sgd"
    rows = torch.stack(list(coefficients), dim=1).double()
    _call(name, _table(tensors), len(tensors), rows.data_ptr(), 1.0 if clip is None else clip)
    # Autograd does not know of kernels that torch has not called: it would take a saved parameter for unchanged.
    increment_version(tensors.params)


def _others(tensors: Tensors, inside: Sequence[int]) -> list[int]:
    return sorted(set(range(len(tensors))) - set(inside))


def _only(coefficients: Coefficients, places: Sequence[int]) -> Coefficients:
    return type(coefficients)(*(column[list(places)] for column in coefficients))


def one_pass(tensors: Tensors, scalars: Tensor, *, skip_nonfinite: bool, skipped: Tensor) -> Report | None:
    """See `Backend.one_pass`. With `torque_steps` it is not taken whole: afterwards there is no sum to take."""
    if tensors.walkable(_KINDS) is not None or any(row.torque_steps != math.inf for row in tensors.numbers):
        return None
    numbers = array("d", (float(value) for row in tensors.numbers for value in row))
    reports = torch.empty(len(tensors), _REPORTS, dtype=torch.float64, device="cpu")
    _call(
        "hf_tam_step", _table(tensors), len(tensors), numbers.buffer_info()[0], bool(tensors.seconds), skip_nonfinite,
        scalars.data_ptr(), reports.data_ptr(),
    )  # fmt: skip
    increment_version(tensors.params)
    sums, keep = reports[:, :NUM_SUMS], None
    if skip_nonfinite and not math.isfinite(float(sums[:, 3].sum())):
        keep = sums[:, 3].isfinite()
        skipped.add_((~keep).sum())
    return Report(sums, reports[:, NUM_SUMS], reports[:, NUM_SUMS + 1], keep)


def _table(tensors: Tensors, with_dot: Sequence[bool] | None = None) -> array[int]:
    """`tensor` in numbers.h, 11 x 64 bits a row: rows that are kept, with the gradients of this step.

    Args:
        tensors: All of them such that the kernels can walk them.
        with_dot: Whether the product of gradient and moment is wanted; None: all are.
    """
    kept, decays = tensors.memory.kept, [row.coupled_decay for row in tensors.numbers]
    key = (list(tensors.groups), decays, tensors.maximize)
    if kept.get("native key") != key:
        kept["native key"], kept["native"] = key, _rows(tensors)
    rows: array[int] = kept["native"]
    rows[2::_FIELDS] = array("q", repeat(True, len(tensors)) if with_dot is None else map(bool, with_dot))
    # Gradients are other tensors in each step, after `zero_grad(set_to_none=True)`; the rest of a row stays.
    rows[5::_FIELDS] = array("q", map(Tensor.data_ptr, tensors.grads))
    return rows


def _rows(tensors: Tensors) -> array[int]:
    signature, rows = tensors.memory.signature, array("q")
    corrected = bool(tensors.corrections)
    for at, param in enumerate(tensors.params):
        second = signature.second_addresses[at] if tensors.seconds else 0
        correction = signature.correction_addresses[at] if corrected else 0
        decay = array("q", array("d", [tensors.coupled_decay(at)]).tobytes())[0]  # the bits of the double
        rows.extend(
            (
                math.prod(signature.params.shapes[at]),
                _KINDS[param.dtype, tensors.firsts[at].dtype][0 if corrected else 1], True, tensors.maximize,
                signature.param_addresses[at], 0, signature.first_addresses[at], second, correction, decay,
                tensors.groups[at],
            )
        )  # fmt: skip
    return rows


def _call(name: str, rows: array[int], count: int, *arguments: float) -> None:
    """Call a function of kernels.c, without the GIL."""
    library = load()
    assert library is not None
    status = getattr(library, name)(rows.buffer_info()[0], count, torch.get_num_threads(), *arguments)
    if status:
        raise MemoryError(f"no memory for the table of the {count} tensors of this step")
