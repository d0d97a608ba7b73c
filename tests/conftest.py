"""What all tests share: no network, the same numbers in every run, and hypothesis without a data base."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small models: more threads only wait for one another, on a busy machine for minutes; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported.
if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("ci", derandomize=True, max_examples=8, **COMMON)
settings.register_profile("thorough", max_examples=300, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    # small tensors: more threads only wait for one another, and on a busy machine for minutes
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _torch_kernels(request, monkeypatch):
    """The backend "fused" stands for torch's kernels in the tests, and "default" for our own."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "fused":
        monkeypatch.setattr("hf_tam.backends.native.is_available", lambda: False)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that start several processes go to one worker: two of them at a time wait for each other's threads."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))
