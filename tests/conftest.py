"""What all tests share: no network, the same numbers in every run, and hypothesis without a data base."""

import gc
import os
import sys
from pathlib import Path

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


_launchers = {"python", "torchrun", "accelerate", "hf-tam", "deepspeed"}
_unmarked: list[str] = []  # the test that is running, if it may not start another Python


def _refuse_launches(event, arguments):
    if event == "subprocess.Popen" and _unmarked:
        executable = Path(os.fsdecode(arguments[0])).name
        if executable.rstrip("0123456789.") in _launchers:
            pytest.fail(f"{_unmarked[0]} starts {executable}: mark it `launch`", pytrace=False)


sys.addaudithook(_refuse_launches)


@pytest.fixture(autouse=True)
def _launches_are_marked(request):
    """A Python that is started costs seconds: the tests that do are left out where only the quick ones are wanted."""
    if not {"launch", "distributed"} & {marker.name for marker in request.node.iter_markers()}:
        _unmarked.append(request.node.nodeid)
    yield
    _unmarked.clear()


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


@pytest.fixture(scope="module")
def small_garbage():
    """Each collection of garbage would walk over all that was imported, for half a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that start several processes go to one worker: two of them at a time wait for each other's threads."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))
