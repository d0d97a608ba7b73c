"""recipes/cluster: what each machine would start, with stand-ins for the commands that only a cluster has."""

import os
import re
import shlex
import subprocess

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from hf_tam.cli.recipe_files import read_header
from recipes import sft
from recipes.support.config import parse_recipe_arguments
from tests.recipes.conftest import ROOT

FOLDER = ROOT / "recipes" / "cluster"
SLURM, SKY = FOLDER / "slurm.sh", FOLDER / "sky.yaml"
NODES, GPUS, HEAD = 2, 8, "node1"
# https://slurm.schedmd.com/sbatch.html
DIRECTIVES = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output", "requeue"}
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
TASK_KEYS = {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
SLURM_VARIABLES = {"SLURM_NNODES": NODES, "SLURM_GPUS_ON_NODE": GPUS, "SLURM_JOB_NODELIST": "node[1-2]"}
SKY_VARIABLES = {
    "SKYPILOT_NUM_NODES": NODES, "SKYPILOT_NUM_GPUS_PER_NODE": GPUS, "SKYPILOT_NODE_IPS": f"{HEAD}\nnode2",
}  # fmt: skip
# srun starts its command once a machine, scontrol names the machines, and accelerate tells what it was asked for.
COMMANDS = {
    "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "node1\\nnode2\\n"',
    "srun": 'test "$1" = --kill-on-bad-exit=1; shift; SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"',
    "accelerate": 'printf "%q " "$@"; echo',
}


@pytest.fixture
def start(tmp_path):
    """Runs a command where the stand-ins are, and returns the words that each call of accelerate got."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)

    def run(words, variables):
        for name, line in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\nset -e\n{line}\n")
            (commands / name).chmod(0o755)
        environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            **{name: str(variables[name]) for name in variables},
        }
        options = {"capture_output": True, "text": True, "check": True, "timeout": 60}
        done = subprocess.run(words, cwd=tmp_path, env=environment, **options)
        return [shlex.split(line) for line in done.stdout.splitlines()]

    return run


def check_launch(words, machine, monkeypatch):
    """What a machine was asked for is understood by accelerate and by the recipe."""
    monkeypatch.chdir(ROOT)
    assert words.pop(0) == "launch"
    launched = launch_command_parser().parse_args(words)
    assert (launched.num_machines, launched.num_processes, launched.machine_rank) == (NODES, NODES * GPUS, machine)
    assert (launched.main_process_ip, launched.main_process_port) == (HEAD, 29500)
    assert launched.config_file == "recipes/accelerate/fsdp2.yaml"
    assert launched.training_script == "recipes/sft.py"
    assert (ROOT / launched.config_file).is_file()
    arguments = launched.training_script_args
    *_, training = parse_recipe_arguments(sft.make_parser(), arguments, demo_config=sft.DEMO_CONFIG)
    assert training.resume_from_checkpoint == "auto"
    return training.output_dir


@pytest.mark.parametrize("path", [SLURM, SKY], ids=lambda path: path.name)
def test_header_says_what_it_is_for(path):
    header = read_header(path.read_text())
    assert list(header) == ["Purpose", "Launch", "Override", "Hardware"]
    assert f"recipes/cluster/{path.name}" in header["Launch"]
    assert max(map(len, path.read_text().splitlines())) <= 119


def test_every_directive_of_slurm_stands_before_the_first_command():
    subprocess.run(["bash", "-n", SLURM], check=True, timeout=60)
    lines = SLURM.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [(index, line) for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(index for index, _ in directives) < first_command
    names = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)[1] for _, line in directives]
    assert set(names) == DIRECTIVES
    assert len(names) == len(DIRECTIVES)


def test_slurm_starts_one_launcher_on_each_machine(start, monkeypatch):
    words = shlex.split(read_header(SLURM.read_text())["Launch"])
    assert words[:2] == ["sbatch", "recipes/cluster/slurm.sh"]
    calls = start(["bash", SLURM, *words[2:], "--output_dir", "a folder"], SLURM_VARIABLES)
    assert [check_launch(call, machine, monkeypatch) for machine, call in enumerate(calls)] == ["a folder"] * NODES
    others = {"LAUNCH_FILE": "recipes/accelerate/ddp.yaml", "SCRIPT": "recipes/no_trainer.py"}
    (call, _) = start(["bash", SLURM], {**SLURM_VARIABLES, **others})
    launched = launch_command_parser().parse_args(call[1:])
    assert (launched.config_file, launched.training_script) == tuple(others.values())


def test_a_job_of_slurm_fails_with_its_launcher(start, monkeypatch):
    monkeypatch.setitem(COMMANDS, "srun", "exit 3")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        start(["bash", SLURM], SLURM_VARIABLES)
    assert failure.value.returncode == 3


def test_sky_starts_one_launcher_on_each_machine(start, monkeypatch):
    task = yaml.safe_load(SKY.read_text())
    assert set(task) == TASK_KEYS
    assert set(task["resources"]) == {"accelerators"}
    assert task["num_nodes"] == NODES
    assert task["resources"]["accelerators"].endswith(f":{GPUS}")
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True, timeout=60)
    for machine in range(NODES):
        variables = {**task["envs"], **SKY_VARIABLES, "SKYPILOT_NODE_RANK": machine}
        (call,) = start(["bash", "-c", task["run"]], variables)
        assert check_launch(call, machine, monkeypatch).startswith("/outputs/")
    assert list(task["file_mounts"]) == ["/outputs"]
    launch = shlex.split(read_header(SKY.read_text())["Launch"])
    assert launch[-1] == f"ARGUMENTS={task['envs']['ARGUMENTS']}"
