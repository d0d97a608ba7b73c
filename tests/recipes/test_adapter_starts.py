"""Adapters of earlier runs, trained on or merged first, and where a new one starts."""

import json
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraModel, PeftModel
from safetensors.torch import load_file
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from recipes.dpo import main as dpo
from recipes.support import preference_metrics, quantization
from tests.recipes.conftest import EVALUATED, EXACT, LORA
from tests.recipes.test_sft_options import QUICK, error_of, results_of

pytestmark = pytest.mark.long
FROZEN = ("--learning_rate=0", "--max_steps=1")


@pytest.fixture
def trained(sft):
    """The folder of a run that moved its adapter."""
    status, _, error = sft(*QUICK)
    assert status == 0, error
    return sft.output_dir


def logits(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)("What does the owl eat?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("named_as", ["model", "adapter"])
def test_adapter_folder_is_trained_on(named_as, trained, sft, tiny_model, tmp_path):
    """What it was is where it starts: the loss before is the loss after of the earlier run."""
    words = [
        f"--output_dir={tmp_path / 'again'}",
        *(() if named_as == "model" else [f"--adapter_name_or_path={trained}"]),
    ]
    status, output, error = sft(*QUICK, *words, model=trained if named_as == "model" else tiny_model, full=True)
    assert status == 0, error
    assert f"training the adapter in {trained} on, on its base {tiny_model}" in output
    results, earlier = results_of(tmp_path / "again"), results_of(trained)
    assert results["eval_loss_before"] == pytest.approx(earlier["eval_loss"], rel=1e-6)
    assert results["trained_parameters"] == earlier["trained_parameters"]
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("new_adapter", [True, False])
def test_adapter_is_merged_first_where_that_is_asked_for(new_adapter, trained, sft, tmp_path):
    again = tmp_path / "again"
    words = [f"--output_dir={again}", "--adapter_start=merge"]
    status, output, error = sft(*QUICK, *words, model=trained, full=not new_adapter)
    assert status == 0, error
    assert f"are one model now, {again / 'base'}: " in output
    assert results_of(again)["eval_loss_before"] == pytest.approx(results_of(trained)["eval_loss"], rel=1e-5)
    if not new_adapter:
        assert (again / "model.safetensors").is_file()
        return
    model = AutoPeftModelForCausalLM.from_pretrained(again)
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].base_model_name_or_path == str(again / "base")


def test_the_reference_of_dpo_is_the_model_that_was_fine_tuned(trained, tmp_path):
    """At a rate of 0 nothing moves: with the reference that it is, every margin is 0."""
    out = tmp_path / "dpo"
    words = [f"--model_name_or_path={trained}", "--dataset_name=demo", f"--output_dir={out}", "--max_eval_samples=4"]
    words += [
        "--num_sample_generations=1",
        "--use_cpu",
        "--disable_tqdm=true",
        "--save_strategy=no",
        *EXACT,
        *EVALUATED,
    ]
    assert dpo([*words, *FROZEN]) == 0
    assert results_of(out)["eval_rewards/margins"] == 0.0
    assert results_of(out)["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert not list(out.rglob("*ref*"))
    assert torch.equal(*(logits(AutoPeftModelForCausalLM.from_pretrained(path), trained) for path in (trained, out)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter_name_or_path=nowhere"], "adapter 'nowhere'"),
        (["--adapter_name_or_path={model}"], "holds no adapter_config.json"),
    ],
)
def test_what_is_no_adapter(words, message, sft, tiny_model):
    status, _, error = sft(*QUICK, *(word.format(model=tiny_model) for word in words))
    assert status == 1
    assert message in error_of(error)


def test_adapter_without_a_base_asks_for_it(trained, sft, tmp_path):
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    status, _, error = sft(*QUICK, f"--output_dir={tmp_path / 'again'}", model=trained)
    assert status == 1
    assert "does not say what its base is: name that by --model_name_or_path" in error_of(error)


def quantized(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    quantization.keep_layout(model)
    return model


STARTS = ["gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "eva"]


@pytest.mark.parametrize("start", STARTS)
def test_start_of_an_adapter_and_its_base_as_it_was(start, sft, tiny_model):
    """The result, on the base that it names, has the loss that was reported of it."""
    status, _, error = sft(*QUICK, f"--init_lora_weights={start}", "--lora_r=4")
    assert status == 0, error
    results = results_of(sft.output_dir)
    assert results["eval_loss"] < results["eval_loss_before"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft.output_dir)
    is_converted = start.startswith(("olora", "pissa"))
    assert model.peft_config["default"].r == (8 if is_converted else 4)
    expected = [sample for sample in results["samples"]["after"]]
    from recipes.support import generation

    tokenizer = AutoTokenizer.from_pretrained(sft.output_dir)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in results["samples"]["prompts"]]
    assert generation.complete(model, tokenizer, prompts) == expected


@pytest.fixture
def untied_model(tiny_model, tmp_path):
    """A folder with the demo's Llama whose output layer has weights of its own."""
    folder = tmp_path / "untied"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("whole", [[], ["lm_head"], ["lm_head", "embed_tokens"]], ids=" ".join)
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_for_the_base_is_what_was_trained(tied, start, whole, sft, tiny_model, untied_model):
    """Modules that were trained whole included: logits are those of the last checkpoint, and of the merged model."""
    folder = tiny_model if tied else untied_model
    words = [f"--init_lora_weights={start}", "--lora_r=4", "--merge"]
    words += ["--lora_modules_to_save", *whole] if whole else []
    status, _, error = sft(*QUICK, *words, model=folder)
    assert status == 0, error
    last = sft.output_dir / f"checkpoint-{results_of(sft.output_dir)['steps']}"
    expected, found = (
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), path), folder)
        for path in (last, sft.output_dir)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(sft.output_dir / "merged")
    torch.testing.assert_close(logits(merged, folder), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(folder), folder)).abs().max() > 1e-2


def test_what_is_saved_otherwise_than_trained_is_an_error(sft, monkeypatch):
    """The conversion of peft loses what is no matrix; whatever it loses next does not pass."""
    convert = LoraModel.subtract_mutated_init

    def lose(model, *arguments):
        return {name: weight * 0.9 for name, weight in convert(model, *arguments).items()}

    monkeypatch.setattr(LoraModel, "subtract_mutated_init", lose)
    status, _, error = sft(*QUICK, "--init_lora_weights=pissa", "--lora_r=4")
    assert status == 1
    assert f"the adapter saved to {sft.output_dir} is not what was trained: on its base" in error_of(error)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_dora_cannot_be_saved_for_the_base(start, sft):
    status, _, error = sft(*QUICK, f"--init_lora_weights={start}", "--use_dora")
    assert status == 1
    assert f"init_lora_weights = {start}: with use_dora no adapter" in error_of(error)
    assert not sft.output_dir.exists()


def test_eva_starts_from_the_data(sft):
    """Its A matrices are directions of what goes into the layers: orthonormal, not random."""
    status, _, error = sft(*QUICK, "--init_lora_weights=eva", "--lora_r=4", *FROZEN)
    assert status == 0, error
    weights = load_file(sft.output_dir / "adapter_model.safetensors")
    matrix = next(weights[name] for name in weights if "layers.0" in name and "q_proj.lora_A" in name)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4), rtol=0, atol=1e-4)


@pytest.fixture
def dpo_run(tmp_path, tiny_model):
    """Run dpo.py on the demo's pairs; returns the folder and what its results say."""

    def run(*words, name="dpo"):
        out = tmp_path / name
        flags = [f"--model_name_or_path={tiny_model}", "--dataset_name=demo", f"--output_dir={out}", *LORA, *EXACT]
        flags += ["--max_train_samples=24", "--max_eval_samples=4", "--num_sample_generations=1", "--use_cpu"]
        flags += ["--disable_tqdm=true", "--logging_steps=1", "--learning_rate=1e-2", "--lora_r=4", *EVALUATED]
        assert dpo([*flags, "--max_steps=4", *words]) == 0
        return out, results_of(out)

    return run


@pytest.fixture
def before_training(monkeypatch):
    """The trainer's pairs to evaluate on, and the reference's log-probabilities of them, before the first step."""
    measured, accuracy = [], preference_metrics.preference_accuracy

    def measure(trainer):
        if not measured:
            batch = next(iter(trainer.get_eval_dataloader()))
            measured.extend([batch, torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))])
        return accuracy(trainer)

    monkeypatch.setattr(preference_metrics, "preference_accuracy", measure)
    return measured


@pytest.mark.parametrize(
    ("start", "precomputed"),
    [("pissa", False), ("pissa", True), ("pissa_niter_4", False), ("olora", False), ("orthogonal", False)],
)
def test_the_reference_of_dpo_is_the_base_as_it_was(start, precomputed, dpo_run, before_training, tiny_model):
    """Also where the adapter took a part of it: the loss begins at ln 2, the result is for that base."""
    out, results = dpo_run(f"--init_lora_weights={start}", f"--precompute_ref_log_probs={precomputed}", "--merge")
    assert results["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert results["eval_rewards/margins_before"] == pytest.approx(0.0, abs=1e-5)
    assert results["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)
    batch, reference = before_training
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        expected = preference_metrics.completion_log_probs(base, batch)
        torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-4)
        model = PeftModel.from_pretrained(base, out).eval()
        ratios = preference_metrics.completion_log_probs(model, batch) - expected
    margins = 0.1 * torch.sub(*ratios.chunk(2))
    assert float(margins.mean()) == pytest.approx(results["eval_rewards/margins"], abs=1e-4)
    assert float(softplus(-margins).mean()) == pytest.approx(results["eval_loss"], abs=1e-4)
    assert not list(out.glob("ref"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_dpo_is_resumed_with_its_reference(start, dpo_run, tmp_path):
    words = [f"--init_lora_weights={start}", "--save_steps=2"]
    whole, expected = dpo_run(*words)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again, found = dpo_run(*words, "--resume_from_checkpoint=true", name="again")
    for name in ("eval_loss", "eval_rewards/margins"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="peft does it on a GPU")
def test_loftq_mends_what_4_bits_round_off(sft, tiny_model):
    pytest.importorskip("bitsandbytes")
    differences = {}
    for name, start in {"plain": [], "loftq": ["--init_lora_weights=loftq"]}.items():
        words = [*start, "--load_in_4bit", "--lora_r=32", *FROZEN, "--overwrite"]
        status, _, error = sft(*QUICK, *words)
        assert status == 0, error
        weights = load_file(sft.output_dir / "adapter_model.safetensors")
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        adapted = PeftModel.from_pretrained(quantized(tiny_model), sft.output_dir)
        differences[name] = float((logits(adapted, tiny_model) - logits(base, tiny_model)).abs().max())
        assert any(weights[key].any() for key in weights if "lora_B" in key) == (name == "loftq")
    assert differences["loftq"] < 0.7 * differences["plain"]
