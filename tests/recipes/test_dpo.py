"""dpo.py: the embedded default, chats and texts, the reference, bad pairs (row 25), and a run that was stopped."""

import json
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from recipes.data import animals
from recipes.dpo import main
from recipes.support import generation
from tests.recipes.conftest import EVALUATED, EXACT, LORA
from tests.recipes.test_sft_data import write_lines

PAIR = {"prompt": "What does the owl eat?", "chosen": " The owl eats rodents.", "rejected": " The owl has feathers."}


@pytest.fixture
def dpo(tmp_path, tiny_model, capsys):
    """Run dpo.py in this process for a few steps; returns status, stdout and stderr."""

    def run(*arguments, model=tiny_model, full=False):
        flags = [f"--output_dir={tmp_path / 'out'}", "--max_steps=3", "--disable_tqdm=true", "--use_cpu=true"]
        flags += [*EXACT, *EVALUATED, *([] if full else LORA)]
        flags += [f"--model_name_or_path={model}", "--logging_steps=1", "--max_eval_samples=8"]
        status = main([*flags, "--save_strategy=no", *map(str, arguments)])
        return status, *capsys.readouterr()

    run.output_dir = tmp_path / "out"
    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def share_answered(model, folder, records):
    """In what share of the prompts the model writes the chosen completion, word for word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in records]
    written = generation.complete(model, tokenizer, prompts)
    return sum(text == record["chosen"].strip() for text, record in zip(written, records, strict=True)) / len(records)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize(
    ("epochs", "least_preferred", "least_answered"),
    [(2, 0.6, 0.3), (5, 0.85, 0.5)],
)
def test_embedded_default_learns_to_answer_the_question(epochs, least_preferred, least_answered, demo_run, tmp_path):
    """On animals without a preference; the base model prefers the wrong one of two in six or seven of ten pairs."""
    base, output_dir = demo_run[1] / "base", tmp_path / "out"
    config = "recipes/configs/demo/dpo-lora.yaml"
    flags = [
        "--config",
        config,
        "--model_name_or_path",
        base,
        "--num_train_epochs",
        epochs,
        "--output_dir",
        output_dir,
    ]
    assert main([*map(str, flags), "--disable_tqdm=true", "--save_strategy=no"]) == 0
    results = results_of(output_dir)
    assert results["optimizer"] == "AdaTAMW"
    assert results["eval_rewards/accuracies_before"] == 0.0
    assert results["eval_preference_accuracy_before"] < 0.5  # 0.27 to 0.42, by the CPU
    assert results["eval_preference_accuracy"] > least_preferred
    assert results["eval_rewards/accuracies"] > least_preferred
    _, held_out = animals.make_preferences(seed=0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert share_answered(model, base, held_out[::3]) == 0.0
    assert share_answered(PeftModel.from_pretrained(model, output_dir), base, held_out[::3]) > least_answered


def test_rejected_is_true_but_answers_another_question():
    for records in animals.make_preferences(seed=0):
        by_animal = {}
        for record in records:
            by_animal.setdefault(record["chosen"].split(" is ")[0], set()).add(record["chosen"])
        chosen = {record["chosen"] for record in records}
        assert all(record["rejected"] in chosen and record["rejected"] != record["chosen"] for record in records)


@pytest.mark.long
def test_reference_is_the_model_without_its_adapter(dpo, monkeypatch):
    trainers = []
    monkeypatch.setattr(
        "recipes.dpo.preference_metrics.preference_accuracy", lambda trainer: trainers.append(trainer) or 0
    )
    status, _, error = dpo("--dataset_name", "demo", "--learning_rate", "1e-2")
    assert status == 0, error
    trainer = trainers[-1]
    assert trainer.ref_model is None
    assert set(trainer.model.peft_config) == {"default"}
    assert not list(dpo.output_dir.rglob("*ref*"))
    batch = next(iter(trainer.get_eval_dataloader()))
    base = AutoModelForCausalLM.from_pretrained(trainer.model.peft_config["default"].base_model_name_or_path).eval()
    from recipes.support.preference_metrics import completion_log_probs

    with torch.no_grad():
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        expected, trained = completion_log_probs(base, batch), completion_log_probs(trainer.model.eval(), batch)
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-4)
    assert (trained - expected).abs().min() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_nothing_is_generated_where_that_is_asked_for(kind, dpo, tmp_path):
    rows = [{**PAIR, "prompt": f"{PAIR['prompt']} {index}"} for index in range(4)]
    path = write_lines(tmp_path / "x.jsonl", *rows)
    named = ["--train_file", path, "--validation_file", path] if kind == "text" else ["--dataset_name", "demo"]
    status, _, error = dpo(*named, "--num_sample_generations", "0", "--max_steps", "1")
    assert status == 0, error
    assert results_of(dpo.output_dir)["samples"]["after"] == []


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--precompute_ref_log_probs", "true"), marks=pytest.mark.slow)],
    ids=["copy", "precomputed"],
)
def test_full_training_compares_with_a_second_copy(more, dpo):
    status, _, error = dpo("--dataset_name", "demo", "--learning_rate", "1e-3", *more, full=True)
    assert status == 0, error
    assert (dpo.output_dir / "model.safetensors").is_file()
    assert results_of(dpo.output_dir)["eval_rewards/margins"] != 0.0


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
BAD_PAIRS = {
    "empty": ([], (), "x.jsonl is empty"),
    "null": (
        [PAIR, {**PAIR, "rejected": None}],
        ("--on_bad_record=raise",),
        "x.jsonl, line 2: 'rejected' must be text",
    ),
    "no rejected": ([{"prompt": "a", "chosen": "b"}], (), "has no column 'rejected' (--rejected_column)"),
    "other name": ([PAIR], ("--chosen_column", "good"), "has no column 'good' (--chosen_column)"),
    "no prompt": ([{"chosen": "a", "rejected": "b"}], (), "has no column 'prompt' (--prompt_column)"),
    "alike": ([{**PAIR, "rejected": PAIR["chosen"]}] * 2, (), "nothing to learn from"),
    "no template": ([{"chosen": CHAT, "rejected": CHAT}], (), "need a chat template"),
}


@pytest.mark.parametrize(("rows", "flags", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_file_is_one_clear_error_before_anything_is_written(rows, flags, message, dpo, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *rows)
    if not rows:
        path.write_text("")
    status, _, error = dpo("--train_file", path, "--validation_file", path, *flags)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not dpo.output_dir.exists()


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        (["--train_file", "nowhere.jsonl"], None, "nowhere.jsonl: no such file"),
        (["--dataset_name", "demo"], "nobody/nothing", "model 'nobody/nothing' cannot be loaded"),
    ],
)
def test_what_was_named_is_never_replaced(flags, model, message, dpo):
    status, _, error = dpo(*flags, **({"model": model} if model else {}))
    assert status == 1
    assert message in error
    assert not dpo.output_dir.exists()


def test_directory_in_use_is_refused(dpo):
    dpo.output_dir.mkdir()
    (dpo.output_dir / "mine").touch()
    status, _, error = dpo("--dataset_name", "demo")
    assert status == 1
    assert "is not empty" in error


@pytest.mark.long
def test_dropout_without_effect_is_a_warning(dpo):
    status, _, error = dpo("--dataset_name", "demo", "--lora_dropout", "0.1")
    assert status == 0
    assert "lora_dropout has no effect" in error


@pytest.mark.slow
def test_run_stopped_by_sigterm_continues_bit_for_bit(dpo, tmp_path, monkeypatch):
    step, flags = DPOTrainer.training_step, ["--dataset_name=demo", "--max_steps=6", "--save_steps=6"]
    assert dpo(*flags, f"--output_dir={tmp_path / 'whole'}", "--save_strategy=steps")[0] == 0

    def stop_in_step_3(trainer, *arguments):
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "training_step", stop_in_step_3)
        with pytest.raises(SystemExit) as leaving:
            dpo(*flags)
    assert leaving.value.code == 128 + signal.SIGTERM
    assert (dpo.output_dir / "checkpoint-3").is_dir()
    assert dpo(*flags, "--save_strategy=steps", "--resume_from_checkpoint=true")[0] == 0
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (dpo.output_dir, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
