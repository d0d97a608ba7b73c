"""The `hf-tam` command; launching real training with it is tested in tests/integrations/test_launching.py."""

import sys
from importlib.metadata import version

import pytest

from hf_tam import cli
from hf_tam.backends import native
from hf_tam.cli import activate, deactivate, status
from hf_tam.integrations import autoload
from tests.integrations.launching import HF_TAM_COMMAND, run, run_successfully


@pytest.mark.launch
def test_run_replaces_itself_and_returns_the_status_of_the_command():
    program = "import os, sys; print(os.environ['PYTHONPATH'], sys.argv); sys.exit(7)"
    completed = run([*HF_TAM_COMMAND, "run", "--", sys.executable, "-c", program, "--flag", "--", "-x"])
    assert completed.returncode == 7
    assert completed.stdout.split(maxsplit=1) == [autoload.SITE_FOLDER, "['-c', '--flag', '--', '-x']\n"]


@pytest.mark.parametrize(
    ("words", "changes", "code", "message"),
    [
        (["run"], {}, 2, "nothing to run"),
        (["run", "--", "no-such-command"], {}, 127, "no command 'no-such-command' on PATH"),
        (["run", "--", "/"], {}, 126, "'/' cannot be run"),
        (["run", "--", "true"], {"HF_TAM_AUTOLOAD": "0"}, 2, "HF_TAM_AUTOLOAD=0"),
    ],
)
def test_run_says_what_is_wrong(words, changes, code, message, monkeypatch, capsys):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert cli.main(words) == code
    assert message in capsys.readouterr().err


def test_activate_writes_a_readable_hook_and_deactivate_removes_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / activate.HOOK_NAME
    for module in (activate, deactivate):
        monkeypatch.setattr(module, "hook_path", lambda: path)
    assert cli.main(["activate"]) == cli.main(["activate"]) == 0
    lines = path.read_text().splitlines()
    assert [line[0] for line in lines] == ["#", "#", "i"]
    assert cli.main(["deactivate"]) == cli.main(["deactivate"]) == 0
    assert not path.exists()
    assert "not active" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["activate", "deactivate"])
def test_an_environment_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys, command):
    """A folder in the place of the hook: not even root can write or remove it as a file."""
    for module in (activate, deactivate):
        monkeypatch.setattr(module, "hook_path", lambda: tmp_path)
    assert cli.main([command]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.launch
def test_a_hook_that_outlives_hf_tam_is_silent(tmp_path):
    (tmp_path / activate.HOOK_NAME).write_text(activate.HOOK_TEXT)
    program = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print('hf_tam' in sys.modules)"
    assert run_successfully([sys.executable, "-S", "-c", program], PWD="/").split() == ["False"]


@pytest.fixture
def status_lines(tmp_path, monkeypatch, capsys):
    """Runs `hf-tam status` in an environment whose hook, if any, is `hook` in a temporary folder."""
    monkeypatch.setattr(status, "hook_path", lambda: tmp_path / "hook")
    monkeypatch.delenv("HF_TAM_AUTOLOAD", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def lines():
        assert cli.main(["status"]) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def test_status_of_an_environment_as_installed(status_lines):
    lines = status_lines()
    assert f"transformers {version('transformers')}" in lines
    assert "activated: no" in lines
    assert "below hf-tam run: no" in lines
    assert "registered: --optim adatamw (AdaTAMW), --optim adatam (AdaTAM), --optim tam (TAM)" in lines
    (patched,) = (line for line in lines if line.startswith("patched: "))
    assert "_OPTIMIZER_HANDLERS" in patched
    assert "Trainer.create_optimizer" in patched


def test_status_tells_how_the_names_are_carried(status_lines, tmp_path, monkeypatch):
    (tmp_path / "hook").touch()
    assert f"activated: yes, by {tmp_path / 'hook'}" in status_lines()
    monkeypatch.setenv("HF_TAM_AUTOLOAD", "0")
    monkeypatch.setenv("PYTHONPATH", autoload.SITE_FOLDER)
    lines = status_lines()
    assert f"activated: yes, by {tmp_path / 'hook'}, but switched off here by HF_TAM_AUTOLOAD=0" in lines
    assert "below hf-tam run: yes" in lines


def test_status_fails_where_nothing_can_be_registered(monkeypatch, capsys):
    def refuse():
        raise ImportError("transformers 9 has no such name")

    monkeypatch.setattr(autoload, "install", refuse)
    assert cli.main(["status"]) == 1
    assert "registered: nothing. transformers 9 has no such name" in capsys.readouterr().out


def test_a_subcommand_is_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "required: COMMAND" in capsys.readouterr().err


def test_status_says_which_backend_and_which_strategies(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert cli.main(["status"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    reason = native.why_not()
    if reason:
        assert lines["backend"] == f"torch_fused (device: cpu; not native: {reason})"
    else:
        assert lines["backend"].startswith("native (device: cpu")
    assert lines["strategy FSDP1"] == "available (gloo); use_orig_params=True"
    assert lines["strategy FSDP2, HSDP, tensor parallelism"] == "available (gloo)"
    assert "strategy DDP" in lines
    assert lines["strategy DeepSpeed ZeRO"].startswith(("available (", "not installed"))
    assert lines["launched with"] == "WORLD_SIZE=2, ACCELERATE_USE_FSDP=true"
