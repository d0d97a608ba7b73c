"""Ways to run a recipe, in this process and in its own, and the small models that the tests train."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.recipes.forking import ForkServer

ROOT = Path(__file__).resolve().parents[2]

# A new adapter, and what lets a run repeat bit for bit on any CPU; TRL's defaults are no adapter, bfloat16 and
# checkpointed activations.
LORA = ["--use_peft", "--lora_target_modules=all-linear", "--lora_dropout=0"]
EXACT = ["--bf16=false", "--gradient_checkpointing=false"]
EVALUATED = ["--eval_strategy=epoch", "--eval_on_start"]


def recipe_command(script, *arguments):
    return [sys.executable, str(ROOT / "recipes" / script), *map(str, arguments)]


def recipe_environment(tmp_path):
    """One thread, so that a run repeats bit for bit on a machine that does other work too."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf-home")}


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """`python recipes/sft.py` with no arguments, once for all tests: the finished process and its output directory."""
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.run(
        recipe_command("sft.py"),
        cwd=folder,
        env=recipe_environment(folder),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return process, folder / "outputs" / "sft-demo"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with the demo's Llama and tokenizer, hardly trained."""
    from recipes.support.causal_demo import build_base

    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_base(folder, num_steps=2, show_progress=False)
    return folder


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Runs programs in forks of a Python that has imported everything."""
    # The name of a socket is limited to about 100 characters, which pytest's folders may exceed.
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(folder)
        yield server
        server.close()


@pytest.fixture
def sft(tmp_path, tiny_model, capsys):
    """Run sft.py in this process for a few steps; returns status, stdout and stderr."""
    from recipes.sft import main

    def run(*arguments, model=tiny_model, full=False):
        flags = [f"--output_dir={tmp_path / 'out'}", "--max_steps=3", "--disable_tqdm=true", "--use_cpu=true"]
        flags += [*EXACT, *(EVALUATED[1:] if any("eval_steps" in str(word) for word in arguments) else EVALUATED)]
        flags += [] if full else LORA
        named = [f"--model_name_or_path={model}"] if model else []
        status = main([*flags, *named, "--logging_steps=1", "--save_steps=0.5", *map(str, arguments)])
        return status, *capsys.readouterr()

    run.output_dir, run.model = tmp_path / "out", tiny_model
    return run
