"""What the tests of the Triton backend share: tensors on the device that it runs on here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_tam.backends import triton as backend
from hf_tam.update import AdamCoefficients
from tests.handed import mid_training

__all__ = ["DEVICE", "OVERFLOWS_ARE_SAID", "backend", "coefficients", "make_tensors", "moved"]

# The interpreter computes with numpy, which says what overflows; the kernels then take fp64.
OVERFLOWS_ARE_SAID = pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy", "ignore::RuntimeWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(tensor):
    """The same values and strides on `DEVICE`."""
    if tensor is None or DEVICE.type == "cpu":
        return tensor
    if 0 in tensor.stride():
        return tensor[:1].to(DEVICE).expand_as(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def make_tensors(params, *, seed=0, **options):
    """Tensors in mid-training, on `DEVICE`."""
    return mid_training([moved(param) for param in params], seed=seed, **options)


def coefficients(count):
    numbers = {"decay": 0.99, "first_weight": 0.3, "second_decay": 0.9, "second_weight": 0.1, "step_size": 0.01}
    base = torch.ones(count, dtype=torch.float64, device=DEVICE)
    return AdamCoefficients(**{key: base * value for key, value in numbers.items()}, eps=base * 1e-3)
