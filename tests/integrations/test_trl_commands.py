"""TRL's own commands under `hf-tam run`, with the files of recipes/configs/trl, on tiny models and data on disk."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.integrations.launching import HF_TAM_COMMAND, REGISTERED, REPOSITORY, run_successfully

pytest.importorskip("trl")
pytestmark = pytest.mark.launch

CONFIGS = REPOSITORY / "recipes" / "configs" / "trl"
TRL = Path(sys.executable).with_name("trl")
QUESTIONS = ("what does the owl eat", "what does the goat eat", "the owl eats what", "and what does the owl eat")
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS] * 4
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("mice and frogs", "what what the the"))
# A reward that differs between the completions of random weights, in a module that TRL finds by its name.
REWARD = "def variety(completions, **columns):\n    return [len(set(c[0]['content'].split())) for c in completions]\n"
ROWS = {
    "sft": [{"messages": [*prompt, *GOOD]} for prompt in PROMPTS],
    "grpo": [{"prompt": prompt} for prompt in PROMPTS],
    "kto": [{"prompt": prompt, "completion": answer, "label": answer is GOOD} for prompt in PROMPTS
            for answer in (GOOD, BAD)],
    "reward": [{"chosen": [*prompt, *GOOD], "rejected": [*prompt, *BAD]} for prompt in PROMPTS],
}  # fmt: skip
ROWS["rloo"] = ROWS["grpo"]
# Random weights of 1e5 parameters need a far higher rate to move in a few steps.
SMALL = {
    "use_cpu": "true", "bf16": "false", "dtype": "float32", "num_processes": 1, "learning_rate": 1e-2, "max_steps": 3,
    "save_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1,
}  # fmt: skip
GENERATING = {"reward_funcs": "rewards_of_the_test.variety", "num_generations": 4, "max_completion_length": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.recipes.tiny_models import build

    return build("Qwen/Qwen3-0.6B", tmp_path_factory.mktemp("trl") / "model")


@pytest.fixture
def trl(model, tmp_path):
    """Runs a command of TRL with a file of ours, and returns its output; the output directory is tmp_path/out."""
    (tmp_path / "rewards_of_the_test.py").write_text(REWARD)
    data = tmp_path / "data"
    data.mkdir()

    def run(command, config, **more):
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[command]))
        given = {
            "config": config, "model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "out",
            **SMALL, **(GENERATING if command in ("grpo", "rloo") else {}), **more,
        }  # fmt: skip
        flags = [word for name, value in given.items() for word in (f"--{name}", value)]
        return run_successfully(
            [*HF_TAM_COMMAND, "run", "--", TRL, command, *flags], ACCELERATE_USE_CPU="true", PYTHONPATH=str(tmp_path)
        )

    return run


def states_of(checkpoint):
    """Returns the first group of a checkpoint's optimizer and the torque of each tensor."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return saved["param_groups"][0], [float(entry["torque"]) for entry in saved["state"].values()]


def logged(output_dir):
    return [json.loads(line) for line in (output_dir / "torque.jsonl").read_text().splitlines()]


# RLOO is GRPO's trainer but for the advantage, and KTO is resumed below.
@pytest.mark.parametrize(
    "command", ["grpo", "reward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "kto"))]
)
def test_the_file_of_a_command_trains_and_the_damping_moves(command, trl, tmp_path):
    output = trl(command, CONFIGS / f"{command}.yaml")
    group, torques = states_of(tmp_path / "out" / "checkpoint-2")
    assert group["gamma"] == 0.9
    assert len({torque for torque in torques if torque}) > 5
    assert logged(tmp_path / "out")
    assert output.count(REGISTERED) == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_as_one_that_was_not(trl, tmp_path):
    """The moments and the torque come back from the checkpoint: the third step is the same to the last bit."""
    trl("kto", CONFIGS / "kto.yaml", save_steps=1)
    whole, torques = states_of(tmp_path / "out" / "checkpoint-3")
    for name in ("checkpoint-3", "adapter_model.safetensors"):
        (tmp_path / "out" / name).rename(tmp_path / name)
    trl("kto", CONFIGS / "kto.yaml", save_steps=1, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    assert states_of(tmp_path / "out" / "checkpoint-3") == (whole, torques)
    resumed = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert resumed == (tmp_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_other_arguments_of_the_optimizer_arrive(trl, tmp_path):
    """`trl sft` checks its arguments in one process and trains in a child that it launches with accelerate."""
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"optim": "adatamw", "optim_args": "gamma=0.8", "report_to": "none"}))
    output = trl("sft", config)
    group, torques = states_of(tmp_path / "out" / "checkpoint-2")
    assert group["gamma"] == 0.8
    assert len(set(torques)) > 5
    assert output.count(REGISTERED) == 1
