"""What the tests of the Triton backend share: entries on the device that it runs on here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_tam.backends import Entry
from hf_tam.backends import triton as backend
from hf_tam.update import AdamCoefficients

# The interpreter computes with numpy, which says what overflows; the kernels then take fp64.
OVERFLOWS_ARE_SAID = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN_STEP = backend.AdamStep(1e-3, (0.9, 0.999), 1e-8, 0.0, 0.9, 1e-8, None, False, True)


def moved(tensor):
    """The same values and strides on `DEVICE`."""
    if tensor is None or DEVICE.type == "cpu":
        return tensor
    if 0 in tensor.stride():
        return tensor[:1].to(DEVICE).expand_as(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def make_entries(tensors, *, decay=0.0, maximize=False, seed=0):
    """Entries in mid-training: moments that are not zero, gradients at random."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype).as_strided(
            tensor.shape, torch.empty_strided(tensor.shape, tensor.stride()).stride()
        ) if tensor.is_contiguous() else torch.empty_like(tensor).copy_(
            torch.randn(tensor.shape, generator=generator)
        )  # fmt: skip

    return [
        Entry(
            index=index, owner=tensor, param=tensor, raw_grad=moved(like(tensor)), state={},
            first=moved(like(tensor)), second=moved(like(tensor).square()), coupled_decay=decay, maximize=maximize,
        )
        for index, tensor in enumerate(moved(tensor) for tensor in tensors)
    ]  # fmt: skip


def coefficients(count):
    numbers = {"decay": 0.99, "first_weight": 0.3, "second_decay": 0.9, "second_weight": 0.1, "step_size": 0.01}
    base = torch.ones(count, dtype=torch.float64, device=DEVICE)
    return AdamCoefficients(**{key: base * value for key, value in numbers.items()}, eps=base * 1e-3)
