"""Starts programs the way users do, with bounded waits, and reads what the untouched script reports."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
UNTOUCHED_SCRIPT = Path(__file__).with_name("untouched.py")
HF_TAM_COMMAND = [sys.executable, "-c", "import sys; from hf_tam.cli import main; sys.exit(main())"]

REGISTERED = "--optim adatamw (AdaTAMW), --optim adatam (AdaTAM), --optim tam (TAM)"


def environment(**changes):
    """A plain environment: the CPU, no network, one thread, this Python's commands first on PATH."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_TAM_", "ACCELERATE_"))}
    plain |= {
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    plain.pop("PYTHONPATH", None)
    return plain | changes


def run(words, *, timeout=400, **changes):
    """Run a command to its end; on a timeout its whole process group is killed.

    Returns:
        The completed process, with its output as text in `stdout`, errors included.
    """
    process = subprocess.Popen(
        [str(word) for word in words],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=changes.get("PWD", REPOSITORY),
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{words} took longer than {timeout} s; its output was:\n{output}") from None
    return subprocess.CompletedProcess(words, process.returncode, output)


def run_successfully(words, **options):
    """Run a command that must succeed; returns its output."""
    completed = run(words, **options)
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def script_arguments(output_dir, *more):
    return [
        "--output_dir", str(output_dir), "--optim", "adatamw", "--optim_args", "gamma=0.8,scope=tensor,",
        "--max_steps", "4", "--learning_rate", "1e-2", "--save_strategy", "no", "--use_cpu", "true",
        "--report_to", "none", *more,
    ]  # fmt: skip


def assert_adatamw_trained(output_dir, *, world_size=1):
    """The script trained with our class, its options arrived, and the damping is not a constant."""
    reports = [json.loads((output_dir / f"report-{rank}.json").read_text()) for rank in range(world_size)]
    for report in reports:
        assert report["optimizer"] == "hf_tam.AdaTAMW"
        assert report["group"]["gamma"] == 0.8
        assert report["world_size"] == world_size
        dampings = [(1 + torque) / 2 for torques in report["torques"] for torque in torques]
        assert len(set(dampings)) > len(report["torques"]), "the damping hardly varies"
        assert all(0 <= damping <= 1 for damping in dampings)
    assert all(report["torques"] == reports[0]["torques"] for report in reports)
