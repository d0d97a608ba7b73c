"""Every way of launching, on a script that knows nothing of hf_tam."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_tam
from tests.integrations.launching import (
    HF_TAM_COMMAND,
    REGISTERED,
    UNTOUCHED_SCRIPT,
    assert_adatamw_trained,
    run,
    run_successfully,
    script_arguments,
)


@pytest.mark.launch
def test_python_m(tmp_path):
    output = run_successfully([sys.executable, "-m", "hf_tam", UNTOUCHED_SCRIPT, *script_arguments(tmp_path)])
    assert_adatamw_trained(tmp_path)
    assert output.count(REGISTERED) == 1


@pytest.mark.launch
def test_accelerate_launch(tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    run_successfully([*launcher, "-m", "hf_tam", UNTOUCHED_SCRIPT, *script_arguments(tmp_path)])
    assert_adatamw_trained(tmp_path)


@pytest.mark.distributed
def test_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    backend = ["--ddp_backend", "gloo", "--per_device_train_batch_size", "4"]
    output = run_successfully(
        [*launcher, "-m", "hf_tam", UNTOUCHED_SCRIPT, *script_arguments(tmp_path, *backend)],
        ACCELERATE_USE_CPU="true",
    )
    assert_adatamw_trained(tmp_path, world_size=2)
    assert output.count(REGISTERED) == 1


@pytest.mark.launch
def test_hf_tam_run_reaches_children_and_the_next_sitecustomize(tmp_path):
    """The command is a shell: the Python that trains is its child. Another sitecustomize on PYTHONPATH still runs."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import os\nos.environ['OTHER_RAN'] = '1'\n")
    command = [sys.executable, str(UNTOUCHED_SCRIPT), *script_arguments(tmp_path)]
    shell = subprocess.list2cmdline(command).replace("(", "\\(")
    check = f"{sys.executable} -c \"import os; assert os.environ['OTHER_RAN']\""
    output = run_successfully([*HF_TAM_COMMAND, "run", "--", "sh", "-c", f"{check} && {shell}"], PYTHONPATH=str(other))
    assert_adatamw_trained(tmp_path)
    assert output.count(REGISTERED) == 1


@pytest.mark.launch
@pytest.mark.slow
def test_notebook(tmp_path):
    """Cells run one after another in the namespace of `__main__`, and hf_tam is imported after transformers."""
    cells = [
        "import sys\nfrom transformers import TrainingArguments, Trainer\nimport hf_tam",
        f"sys.path.insert(0, {str(UNTOUCHED_SCRIPT.parent)!r})\nimport untouched, accelerate",
        f"def train():\n    sys.argv = ['cell', *{script_arguments(tmp_path)!r}]\n    untouched.main()",
        "accelerate.notebook_launcher(train, num_processes=1)",
    ]
    shell = f"namespace = {{'__name__': '__main__'}}\nfor cell in {cells!r}:\n    exec(cell, namespace)"
    run_successfully([sys.executable, "-c", shell])
    assert_adatamw_trained(tmp_path)


LAUNCHING_SCRIPT = """
import sys

import accelerate

sys.path.insert(0, sys.argv.pop(1))
import untouched

if __name__ == "__main__":
    accelerate.debug_launcher(untouched.main, num_processes=2)
"""


@pytest.mark.distributed
def test_a_script_that_launches_its_own_processes(tmp_path):
    """accelerate's debug_launcher is its notebook_launcher for several processes on the CPU."""
    script = tmp_path / "launching.py"
    script.write_text(LAUNCHING_SCRIPT)
    arguments = [UNTOUCHED_SCRIPT.parent, *script_arguments(tmp_path)]
    run_successfully([sys.executable, "-m", "hf_tam", script, *arguments])
    assert_adatamw_trained(tmp_path, world_size=2)


SPAWNING_SCRIPT = """
import json
import multiprocessing
import pickle
import sys

import torch
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(index)


def parse_in_child(rank, queue):
    from transformers import TrainingArguments

    queue.put(str(TrainingArguments("unused", optim="adatamw", use_cpu=True).optim))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=parse_in_child, args=(0, queue))
    process.start()
    from_child = queue.get(timeout=300)
    process.join(timeout=60)
    loaded = [int(item) for item in DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")]
    again = pickle.loads(pickle.dumps(Numbers()))
    print(json.dumps({"child": from_child, "loaded": loaded, "pickled": len(again), "argv": sys.argv[1:]}))
"""


@pytest.mark.slow
@pytest.mark.launch
def test_spawned_processes_of_a_script_know_its_classes_and_the_names(tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING_SCRIPT)
    output = run_successfully([sys.executable, "-m", "hf_tam", script, "--flag"])
    report = json.loads(output.splitlines()[-1])
    assert report == {"child": "adatamw", "loaded": [0, 1, 2, 3], "pickled": 4, "argv": ["--flag"]}


@pytest.fixture(scope="module")
def activated_python(tmp_path_factory):
    """An environment of its own, with this one's packages: activate must write to the running one only."""
    folder = tmp_path_factory.mktemp("activated")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site_packages / "parent.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in packages))
    # hf_tam itself may be installed as a link to its source tree.
    (site_packages / "a_source.pth").write_text(f"{Path(hf_tam.__file__).parents[1]}\n")
    run_successfully([python, *HF_TAM_COMMAND[1:], "activate"])
    return python


@pytest.mark.slow
@pytest.mark.launch
def test_activated_environment(activated_python, tmp_path):
    run_successfully([activated_python, UNTOUCHED_SCRIPT, *script_arguments(tmp_path)])
    assert_adatamw_trained(tmp_path)


@pytest.mark.launch
def test_kill_switch_and_deactivation(activated_python):
    probe = [activated_python, "-c", "import sys; print('hf_tam' in sys.modules)"]
    assert run_successfully(probe).strip() == "True"
    assert run_successfully(probe, HF_TAM_AUTOLOAD="0").strip() == "False"
    assert "removed" in run_successfully([activated_python, *HF_TAM_COMMAND[1:], "deactivate"])
    assert run_successfully(probe).strip() == "False"
    assert "not active" in run_successfully([activated_python, *HF_TAM_COMMAND[1:], "deactivate"])


@pytest.mark.launch
@pytest.mark.parametrize("arguments", [[], ["missing.py"]])
def test_python_m_without_a_script_says_how_to_use_it(arguments):
    completed = run([sys.executable, "-m", "hf_tam", *arguments])
    assert completed.returncode == 1
    assert "usage: python -m hf_tam SCRIPT" in completed.stdout


@pytest.mark.launch
def test_a_script_is_compiled_and_found_as_python_does(tmp_path):
    """Neither our own __future__ imports nor a link to the script may change what it sees."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "sibling.py").write_text("VALUE = 7\n")
    lines = (
        "import dataclasses, sibling",
        "@dataclasses.dataclass",
        "class Settings:",
        "    size: int = sibling.VALUE",
        "print(dataclasses.fields(Settings)[0].type is int, Settings().size)",
    )
    (tmp_path / "real" / "script.py").write_text("\n".join(lines))
    link = tmp_path / "link.py"
    link.symlink_to(tmp_path / "real" / "script.py")
    assert run_successfully([sys.executable, "-m", "hf_tam", str(link)]).splitlines()[-1] == "True 7"
