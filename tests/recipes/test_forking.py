"""The fork server that runs programs: a program, or the server, that dies is told of, and the next program runs."""

import os
import signal
import tempfile

import pytest

from tests.recipes.forking import ForkServer

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def server():
    """One that has imported nothing, so that it starts at once."""
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(folder, imported=())
        yield server
        server.close()


@pytest.fixture
def run(server, tmp_path):
    def run_program(program):
        (tmp_path / "program.py").write_text(program)
        return server.run([tmp_path / "program.py"], timeout=60)

    return run_program


def assert_runs(run):
    completed = run("print('here'); raise SystemExit(3)")
    assert (completed.returncode, completed.stdout) == (3, "here\n")


def test_a_program_that_ends_by_itself(run):
    assert_runs(run)


def test_a_program_that_has_a_segmentation_fault(run):
    completed = run("import faulthandler\ndef fault():\n    faulthandler._sigsegv()\nfault()")
    assert completed.returncode == 1
    assert "Fatal Python error: Segmentation fault" in completed.stdout
    assert "line 3 in fault" in completed.stdout
    assert "a signal ended it" in completed.stdout
    assert_runs(run)


def test_a_program_that_is_killed(run):
    completed = run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert completed.returncode == 1
    assert "a signal ended it" in completed.stdout


def test_a_server_that_dies_under_a_program(server, run):
    with pytest.raises(AssertionError, match=f"the fork server ended with -{signal.SIGKILL.value}"):
        run("import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(1)")
    assert_runs(run)


def test_a_server_that_has_died_in_the_meantime(server, run):
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(60)
    assert_runs(run)
