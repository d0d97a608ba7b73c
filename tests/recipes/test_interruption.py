"""Ctrl-C and SIGTERM end training with a checkpoint (row 27), and resuming gives the run that was never stopped."""

import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_tam.integrations.transformers.checkpoint import last_complete_checkpoint
from recipes.support.causal_trainer import TokenWeightedTrainer
from recipes.support.reporting import read_metrics
from tests.recipes.conftest import EVALUATED, EXACT, LORA, recipe_command, recipe_environment

NUM_STEPS = 60
SIGNAL_AFTER = 10


def command(output_dir, model, *more):
    """A run that has dropout, a schedule and evaluations in it, so that there is a state to get wrong."""
    options = {
        "model_name_or_path": model,
        "dataset_name": "demo",
        "output_dir": output_dir,
        "max_steps": NUM_STEPS,
        "learning_rate": 3e-3,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 4,
        "max_eval_samples": 4,
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
    }
    flags = [*LORA, *EXACT, *EVALUATED, *(f"--{name}={value}" for name, value in options.items())]
    return recipe_command("sft.py", *flags, *more)


def interrupt(process, metrics_file, number):
    """Send the signal once training is well under way."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= SIGNAL_AFTER and "loss" in row for row in read_metrics(metrics_file)):
            process.send_signal(number)
            return
        time.sleep(0.02)
    pytest.fail(f"training did not reach step {SIGNAL_AFTER}: {process.communicate()[1][-2000:]}")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    environment = recipe_environment(output_dir.parent)
    subprocess.run(
        command(output_dir, tiny_model, "--save_strategy=steps", f"--save_steps={NUM_STEPS}"),
        env=environment,
        check=True,
        timeout=400,
    )
    return output_dir


def stopped_run(output_dir, model, number):
    """Start a run, send it the signal, and return the checkpoint that it leaves."""
    environment = recipe_environment(output_dir.parent)
    process = subprocess.Popen(
        command(output_dir, model), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    interrupt(process, output_dir / "metrics.jsonl", number)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 128 + number, error[-2000:]
    assert "Traceback" not in error
    assert f"{number.name}: stopping after this step, with a checkpoint; again to abort" in error
    (checkpoint,) = output_dir.glob("checkpoint-*")
    stopped_at = int(checkpoint.name.removeprefix("checkpoint-"))
    assert SIGNAL_AFTER <= stopped_at < NUM_STEPS
    assert f"{number.name}: stopped after step {stopped_at} of {NUM_STEPS}" in error
    assert "--resume_from_checkpoint true" in error
    assert not (output_dir / "adapter_model.safetensors").exists()
    return checkpoint


@pytest.mark.launch
def test_ctrl_c_leaves_a_complete_checkpoint(tiny_model, tmp_path):
    checkpoint = stopped_run(tmp_path / "run", tiny_model, signal.SIGINT)
    assert last_complete_checkpoint(tmp_path / "run") == checkpoint


@pytest.mark.launch
def test_run_stopped_by_sigterm_continues_bit_for_bit(uninterrupted, tiny_model, tmp_path):
    output_dir = tmp_path / "run"
    stopped_run(output_dir, tiny_model, signal.SIGTERM)
    more = ["--resume_from_checkpoint", "true", "--save_strategy=steps", f"--save_steps={NUM_STEPS}"]
    environment = recipe_environment(tmp_path)
    subprocess.run(command(output_dir, tiny_model, *more), env=environment, check=True, timeout=400)
    same_state(output_dir / f"checkpoint-{NUM_STEPS}", uninterrupted / f"checkpoint-{NUM_STEPS}")
    losses, expected = (
        [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        for folder in (output_dir, uninterrupted)
    )
    assert losses == expected


def test_ctrl_c_before_training_is_one_line(sft, monkeypatch):
    def interrupt_loading(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.support.causal_data.load_splits", interrupt_loading)
    status, _, error = sft("--dataset_name", "demo")
    assert status == 130
    assert error == "interrupted outside training: no checkpoint was written\n"
    assert not sft.output_dir.exists()


@pytest.mark.long
def test_ctrl_c_in_an_evaluation_is_answered_at_once(sft, monkeypatch):
    """And the evaluation goes on to its end, and the run to a checkpoint."""
    evaluate, said, write = TokenWeightedTrainer.prediction_step, [], os.write
    monkeypatch.setattr(os, "write", lambda file, text: said.append(text) if file == 2 else write(file, text))

    def interrupt(trainer, *arguments, **options):
        if trainer.state.global_step == 1 and not said:
            signal.raise_signal(signal.SIGINT)
            assert b"SIGINT: stopping after this step" in said[0]
        return evaluate(trainer, *arguments, **options)

    monkeypatch.setattr(TokenWeightedTrainer, "prediction_step", interrupt)
    with pytest.raises(SystemExit) as leaving:
        sft(
            "--dataset_name",
            "demo",
            "--max_train_samples=24",
            "--max_eval_samples=6",
            "--eval_steps=1",
            "--max_steps=5",
        )
    assert leaving.value.code == 130
    assert len(said) == 1
    assert list(sft.output_dir.glob("checkpoint-*"))


def same_state(folder, other):
    weights, other_weights = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (folder, other)]
    assert states[0].keys() == states[1].keys()
    for parameter, state in states[0].items():
        assert state["torque"] != 0
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][parameter][key])), key
