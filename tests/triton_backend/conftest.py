"""The Triton backend: compiled where there is a GPU, otherwise in Triton's interpreter, on CPU tensors."""

import pytest

from tests import interpreting


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    interpreting.prepare()


@pytest.fixture
def only_triton(monkeypatch):
    """Optimizers run on the Triton kernels wherever their tensors are."""
    from hf_tam.backends import triton as backend

    monkeypatch.setattr("hf_tam.step.gathering.select_backend", lambda device, **_: backend)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched so far."""
    from hf_tam.backends import triton as backend

    kind = type(backend.update_kernel)
    run, names = kind.run, []

    def counted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    return names
