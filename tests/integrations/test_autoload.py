"""The lazy hook: what it waits for, what it costs, and the sitecustomize that carries it to children."""

import os
import statistics
import sys

import pytest

from hf_tam.integrations import autoload
from tests.integrations.launching import run_successfully


@pytest.fixture
def module_folder(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text("VALUE = 1\n")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("awaited_module", "broken_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def seen(monkeypatch):
    modules = []
    hook = autoload.PostImportHook(["awaited_module", "broken_module", "missing_module"], modules.append)
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    return modules


@pytest.mark.usefixtures("module_folder")
class TestPostImportHook:
    def test_calls_back_once_with_the_executed_module(self, seen):
        import awaited_module

        assert seen == [awaited_module]
        assert awaited_module.VALUE == 1
        assert "exec_module" not in vars(awaited_module.__loader__), "the loader is left as it was"
        del sys.modules["awaited_module"]
        import awaited_module as again

        assert seen == [awaited_module]
        assert again is not awaited_module

    def test_a_failed_import_stays_the_error_it_was(self, seen):
        with pytest.raises(RuntimeError, match="broken"):
            import broken_module  # noqa: F401
        with pytest.raises(ModuleNotFoundError, match="missing_module"):
            import missing_module  # noqa: F401
        assert seen == []


def test_environment_of_children():
    changed = {"PYTHONPATH": "before"}
    autoload.extend_to_children(changed)
    autoload.extend_to_children(changed)
    assert changed["PYTHONPATH"] == autoload.SITE_FOLDER + os.pathsep + "before"
    assert changed[autoload.ANNOUNCE_VARIABLE] == "1"
    empty = {}
    autoload.extend_to_children(empty)
    assert empty["PYTHONPATH"] == autoload.SITE_FOLDER


LIGHT = """
import sys
import hf_tam
print([name for name in ("torch", "transformers", "typing", "inspect", "dataclasses") if name in sys.modules])
print(any(type(finder).__name__ == "PostImportHook" for finder in sys.meta_path))
"""


@pytest.mark.launch
def test_importing_hf_tam_imports_neither_torch_nor_transformers():
    """Nor `typing`, whose import alone would take most of the time that the hook may take."""
    assert run_successfully([sys.executable, "-c", LIGHT]).splitlines() == ["[]", "True"]


TIMED = """
import time
start = time.process_time()  # not what other programs take meanwhile
import hf_tam
print(time.process_time() - start)
"""


@pytest.mark.launch
def test_a_python_that_never_imports_transformers_pays_under_5_ms(tmp_path):
    """With cached bytecode, as an installed package has it; the median, since a busy machine has colder caches."""
    cached = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    seconds = [float(run_successfully([sys.executable, "-c", TIMED], **cached)) for _ in range(16)]
    assert statistics.median(seconds[1:]) < 0.005


SITE_CUSTOMIZE = "import os\nos.environ['OTHER_RAN'] = os.environ.get('OTHER_RAN', '') + 'x'\n"
PROBE = """
import os, sys
print(os.environ.get("OTHER_RAN"), sys.modules["sitecustomize"].__file__, "hf_tam" in sys.modules)
"""


class TestSitecustomize:
    def start(self, *more, **changes):
        changed = dict(changes)
        autoload.extend_to_children(changed)
        return run_successfully([sys.executable, *more, "-c", PROBE], **changed).split()

    @pytest.mark.launch
    def test_chains_to_the_next_one(self, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
        assert self.start(PYTHONPATH=str(tmp_path)) == ["x", str(tmp_path / "sitecustomize.py"), "True"]

    @pytest.mark.launch
    def test_stands_alone(self):
        assert self.start() == ["None", os.path.join(autoload.SITE_FOLDER, "sitecustomize.py"), "True"]

    @pytest.mark.launch
    def test_kill_switch(self):
        assert self.start(HF_TAM_AUTOLOAD="0")[2] == "False"

    @pytest.mark.launch
    def test_a_python_without_hf_tam_starts_in_silence(self):
        """-S leaves site-packages out; the sitecustomize is then imported by hand."""
        changed = {}
        autoload.extend_to_children(changed)
        statement = "import sitecustomize, sys; print('hf_tam' in sys.modules)"
        output = run_successfully([sys.executable, "-S", "-c", statement], **changed, PWD="/")
        assert output.split() == ["False"]
