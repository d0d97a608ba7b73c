"""The README's command: sft.py without arguments, and what it claims."""

import json
import math
import statistics

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.data import animals
from recipes.sft import main
from recipes.support import causal_demo
from recipes.support.encoding import encode
from recipes.support.reporting import read_metrics
from tests.recipes.conftest import EVALUATED, EXACT, LORA

# They share a run that takes a minute, which each worker would repeat.
pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.long]


def test_demo_runs_and_says_what_it_is(demo_run):
    process, output_dir = demo_run
    assert process.returncode == 0, process.stderr[-2000:]
    assert "This is the demo" in process.stdout
    assert "--train_file" in process.stdout
    assert "AdaTAMW" in process.stdout
    results = json.loads((output_dir / "results.json").read_text())
    assert results["optimizer"] == "AdaTAMW"
    assert 0.0 < results["damping_mean"] < 1.0
    assert results["damping_mean"] != 0.5
    assert results["settings"]["SFTConfig"]["optim"] == "adatamw"


def test_demo_answers_about_animals_it_was_never_asked_about(demo_run):
    results = json.loads((demo_run[1] / "results.json").read_text())
    assert results["eval_perplexity"] < 0.5 * results["eval_perplexity_before"]
    assert results["eval_token_accuracy"] > 0.9 > results["eval_token_accuracy_before"]
    _, held_out = animals.make_questions(seed=0)
    answers = {record["prompt"]: record["completion"].strip() for record in held_out}
    samples = results["samples"]
    expected = [answers[prompt] for prompt in samples["prompts"]]
    assert samples["after"] == expected
    assert samples["before"] != expected


def test_held_out_animals_are_not_in_the_training_questions():
    train, held_out = animals.make_questions(seed=0)
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in held_out}
    assert (len(train), len(held_out)) == (360, 120)


def test_demo_logs_every_event_as_json(demo_run):
    rows = read_metrics(demo_run[1] / "metrics.jsonl")
    assert sum("loss" in row for row in rows) >= 10
    evaluations = [row for row in rows if "eval_perplexity" in row]
    assert [row["epoch"] for row in evaluations] == [0, 1, 2, 3, 4, 5]
    for row in evaluations:
        assert row["eval_perplexity"] == pytest.approx(torch.tensor(row["eval_loss"]).exp().item(), rel=2e-2)


def test_saved_adapter_gives_the_reported_perplexity(demo_run):
    output_dir = demo_run[1]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output_dir / "base"), output_dir).eval()
    targets = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    _, held_out = causal_demo.demo_records()
    total, count = 0.0, 0
    for row in encode(held_out, tokenizer=tokenizer, max_length=None).dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = adapted(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    results = json.loads((output_dir / "results.json").read_text())
    assert math.exp(total / count) == pytest.approx(results["eval_perplexity"], rel=1e-4)


@pytest.mark.long
def test_improvement_is_larger_than_its_spread_over_seeds(demo_run, tmp_path):
    """Three adaptations of the one pretrained base, shorter than the demo's."""
    before, after = [], []
    for seed in range(3):
        arguments = {
            "model_name_or_path": demo_run[1] / "base",
            "dataset_name": "demo",
            "output_dir": tmp_path / str(seed),
            "seed": seed,
            "num_train_epochs": 1,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 60,
            "save_strategy": "no",
            "disable_tqdm": "true",
            "use_cpu": "true",
            "num_sample_generations": 0,
        }
        words = [*LORA, *EXACT, *EVALUATED, *(f"--{name}={value}" for name, value in arguments.items())]
        assert main(words) == 0
        results = json.loads((tmp_path / str(seed) / "results.json").read_text())
        before.append(results["eval_perplexity_before"])
        after.append(results["eval_perplexity"])
    assert len(set(before)) == 1
    assert len(set(after)) == 3
    improvement = before[0] - statistics.mean(after)
    assert improvement > 3 * (max(after) - min(after))


def test_training_arguments_load_without_the_recipes(demo_run):
    arguments = torch.load(demo_run[1] / "training_args.bin", weights_only=False)
    assert type(arguments).__module__ == "trl.trainer.sft_config"
    assert type(arguments.optim) is str
