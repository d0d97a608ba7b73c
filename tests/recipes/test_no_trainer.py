"""The loop written by hand: the demo, what it saves and resumes, and what it refuses."""

import json
import os
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from recipes import no_trainer
from recipes.support import causal_demo, state_checkpoints
from recipes.support.reporting import read_metrics

NUM_STEPS, STEPS_PER_EPOCH = 12, 5


@pytest.fixture
def run(tmp_path, tiny_model, capsys):
    """Run no_trainer.py in this process; returns status, stdout and stderr."""

    def start(*arguments, output_dir=tmp_path / "out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        options = {
            "model_name_or_path": tiny_model,
            "dataset_name": "demo",
            "output_dir": output_dir,
            "max_train_samples": 19,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": NUM_STEPS,
            "learning_rate": 3e-3,
            "lora_dropout": 0.1,
            "max_eval_samples": 4,
            "num_sample_generations": 0,
            "logging_steps": 1,
            "save_steps": 4,
            "disable_tqdm": "true",
            "use_cpu": "true",
        }
        status = no_trainer.main([*(f"--{name}={value}" for name, value in options.items()), *map(str, arguments)])
        return status, *capsys.readouterr()

    start.output_dir = tmp_path / "out"
    return start


@pytest.mark.long
@pytest.mark.xdist_group("demo")
def test_demo_runs_and_perplexity_falls(demo_run, tmp_path, monkeypatch, capsys):
    """The script without arguments; its base model is the one that the demo of sft.py has pretrained."""

    def copy_base(folder, **options):
        shutil.copytree(demo_run[1] / "base", folder)

    monkeypatch.setattr(causal_demo, "build_base", copy_base)
    monkeypatch.chdir(tmp_path)
    assert no_trainer.main([]) == 0
    output = capsys.readouterr().out
    assert "This is the demo" in output
    assert "AdaTAMW" in output
    folder = tmp_path / "outputs" / "no-trainer-demo"
    results = json.loads((folder / "results.json").read_text())
    assert results["eval_perplexity"] < 0.5 * results["eval_perplexity_before"]
    assert results["eval_token_accuracy"] > 0.9 > results["eval_token_accuracy_before"]
    assert results["samples"]["before"] != results["samples"]["after"]
    assert 0.0 < results["damping_mean"] < 1.0
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["epoch"] for row in rows if "eval_loss" in row] == [0, 1, 2, 3, 4, 5]
    expected = json.loads((demo_run[1] / "results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(expected["eval_perplexity"], rel=1e-3)


@pytest.mark.long
def test_run_stopped_by_sigterm_continues_bit_for_bit(run, tmp_path, monkeypatch):
    """It stops in the middle of an epoch, with dropout, accumulation and a schedule: there is a state to get wrong."""
    whole = tmp_path / "whole"
    assert run(output_dir=whole)[0] == 0
    stop_after = STEPS_PER_EPOCH + 2
    take_step, steps = no_trainer.train_step, []

    def take_step_and_stop(job, window):
        steps.append(take_step(job, window))
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps[-1]

    monkeypatch.setattr(no_trainer, "train_step", take_step_and_stop)
    with pytest.raises(SystemExit) as leaving:
        run()
    assert leaving.value.code == 128 + signal.SIGTERM
    assert not (run.output_dir / "adapter_model.safetensors").exists()
    assert state_checkpoints.newest(run.output_dir).name == f"checkpoint-{stop_after}"
    monkeypatch.setattr(no_trainer, "train_step", take_step)
    torch.manual_seed(1)
    assert run("--resume_from_checkpoint", "true")[0] == 0
    assert_same_state(run.output_dir, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_resuming_in_two_processes_is_exact(fork_server, tiny_model, tmp_path):
    """Each process has dropout of its own."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch_ddp(fork_server, tiny_model, whole)
    parts.mkdir()
    shutil.copytree(whole / "checkpoint-8", parts / "checkpoint-8")
    shutil.copy(whole / "metrics.jsonl", parts)
    launch_ddp(fork_server, tiny_model, parts, "--resume_from_checkpoint=auto")
    assert_same_state(parts, whole)


def launch_ddp(fork_server, model, output_dir, *more):
    options = {
        "model_name_or_path": model,
        "dataset_name": "demo",
        "output_dir": output_dir,
        "max_train_samples": 19,
        "per_device_train_batch_size": 2,
        "max_steps": NUM_STEPS,
        "learning_rate": 3e-3,
        "lora_dropout": 0.1,
        "max_eval_samples": 4,
        "num_sample_generations": 0,
        "logging_steps": 1,
        "save_steps": 4,
    }
    launcher = ["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", 2, "--mixed_precision", "no"]
    launcher += ["--main_process_port", 0]
    flags = [f"--{name}={value}" for name, value in options.items()]
    completed = fork_server.run(
        ["-m", "accelerate.commands.launch", *launcher, "recipes/no_trainer.py", *flags, *more],
        timeout=400,
        ACCELERATE_USE_CPU="true",
    )
    assert completed.returncode == 0, completed.stdout[-4000:]


def assert_same_state(folder, expected):
    """Weights, every state of the optimizer, and the losses on the way."""
    last = f"checkpoint-{NUM_STEPS}"
    weights, others = (load_file(path / last / "model.safetensors") for path in (folder, expected))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    states = [torch.load(path / last / "optimizer.bin", weights_only=True)["state"] for path in (folder, expected)]
    assert states[0].keys() == states[1].keys()
    for parameter, state in states[0].items():
        assert state["torque"] != 0
        assert all(torch.equal(state[key], states[1][parameter][key]) for key in state)
    losses, expected_losses = (
        [(row["step"], row["loss"]) for row in read_metrics(path / "metrics.jsonl") if "loss" in row]
        for path in (folder, expected)
    )
    assert losses == expected_losses


KILLED_IN_A_SAVE = """
import os, signal, sys
sys.path.insert(0, {root!r})
from accelerate import checkpointing
from recipes import no_trainer
save = checkpointing.save

def save_half(state, path, **options):
    save(state, path, **options)
    if "checkpoint-8" in str(path) and "optimizer" in str(path):
        with open(path, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)

checkpointing.save = save_half
sys.exit(no_trainer.main())
"""


@pytest.mark.launch
def test_job_killed_inside_a_save_resumes_from_the_checkpoint_before(run, fork_server, tmp_path, tiny_model):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_A_SAVE.format(root=os.getcwd()))
    flags = [f"--model_name_or_path={tiny_model}", "--dataset_name=demo", f"--output_dir={run.output_dir}"]
    flags += ["--max_train_samples=19", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    flags += [f"--max_steps={NUM_STEPS}", "--learning_rate=3e-3", "--lora_dropout=0.1", "--max_eval_samples=4"]
    flags += ["--num_sample_generations=0", "--logging_steps=1", "--save_steps=4", "--use_cpu=true"]
    completed = fork_server.run([script, *flags], timeout=400)
    assert completed.returncode != 0
    assert sorted(path.name for path in run.output_dir.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-8.partial",
    ]
    status, output, _ = run("--resume_from_checkpoint", "auto")
    assert status == 0
    assert "resuming after step 4" in output
    whole = tmp_path / "whole"
    assert run(output_dir=whole)[0] == 0
    assert_same_state(run.output_dir, whole)
    assert checkpoints_in(run.output_dir) == ["checkpoint-12", "checkpoint-8"]


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


OTHER_RUN = '{"step": 3, "strategy": "DDP, 8 processes", "files": {}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.bin", "cut off", "has 7 bytes where"),
        ("random_states_0.pkl", None, "random_states_0.pkl is missing"),
        ("manifest.json", None, "is no complete checkpoint of this script"),
        ("manifest.json", "{", "is no complete checkpoint of this script"),
        ("manifest.json", OTHER_RUN, "was written by a run with DDP, 8 processes, this one is single process"),
    ],
)
def test_harmed_checkpoint_is_refused_by_name(name, content, message, run):
    assert run("--max_steps", 3, "--save_steps", 3)[0] == 0
    path = run.output_dir / "checkpoint-3" / name
    path.unlink() if content is None else path.write_text(content)
    status, _, error = run("--resume_from_checkpoint", run.output_dir / "checkpoint-3")
    assert status == 1
    assert message in error


def test_checkpoint_of_another_adapter_is_refused(run):
    assert run("--max_steps", 3, "--save_steps", 3)[0] == 0
    more = ("--resume_from_checkpoint", "true", "--lora_target_modules", "q_proj")
    status, _, error = run("--max_steps", 5, *more)
    assert status == 1
    assert "holds the weights of another model or adapter" in error


def test_full_fine_tuning_resumes_too(run, tmp_path):
    """The embedding and the output layer of the model share their weights."""
    assert run("--full", "--max_steps", 4, "--save_steps", 2)[0] == 0
    parts = tmp_path / "parts"
    parts.mkdir()
    shutil.copytree(run.output_dir / "checkpoint-2", parts / "checkpoint-2")
    assert run("--full", "--max_steps", 4, "--resume_from_checkpoint", "auto", output_dir=parts)[0] == 0
    weights, others = (load_file(path / "model.safetensors") for path in (parts, run.output_dir))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_directory_in_use_is_refused_and_overwrite_replaces_the_run(run):
    stale = run.output_dir / "checkpoint-999"
    stale.mkdir(parents=True)
    (run.output_dir / "notes.txt").write_text("mine")
    status, _, error = run("--max_steps", 1)
    assert status == 1
    assert "is not empty" in error
    assert run("--max_steps", 1, "--overwrite")[0] == 0
    assert not stale.exists()
    assert (run.output_dir / "notes.txt").read_text() == "mine"


def test_resuming_from_nothing(run):
    status, _, error = run("--resume_from_checkpoint", "true")
    assert status == 1
    assert "has no complete checkpoint" in error
    assert run("--resume_from_checkpoint", "auto", "--max_steps", 1)[0] == 0


def test_tensor_parallelism_in_one_process_is_one_line(run):
    status, _, error = run("--tp_size", 2)
    assert status == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_without_clipping_the_norm_is_left_out(run):
    assert run("--max_steps", 2, "--max_grad_norm", 0, "--save_strategy", "no", "--eval_strategy", "no")[0] == 0
    rows = read_metrics(run.output_dir / "metrics.jsonl")
    named = [sorted(name for name in row if not name.startswith("torque/")) for row in rows[:2]]
    assert named == [["epoch", "learning_rate", "loss", "step"]] * 2
    assert all("torque/lora_B_damping_mean" in row for row in rows[:2])
    assert {row["step"] for row in read_metrics(run.output_dir / "torque.jsonl")} == {1, 2}
    assert json.loads((run.output_dir / "results.json").read_text())["tokens_per_second"] > 0
    assert not list(run.output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--save_steps=0", "save_steps = 0: must be at least 1"),
        ("--max_grad_norm=nan", "max_grad_norm = nan: must be at least 0"),
        ("--num_train_epochs=0", "num_train_epochs = 0.0: must be above 0"),
        ("--tp_size=0", "tp_size = 0: must be at least 1"),
        ("--scope=layer", "invalid choice: 'layer'"),
        ("--optim=adatamw", "unknown argument --optim"),
    ],
)
def test_argument_out_of_range_is_one_line(flag, message, capsys):
    with pytest.raises(SystemExit):
        no_trainer.main(["--train_file=mine.jsonl", flag])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
