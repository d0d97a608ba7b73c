"""What sft.py can do besides plain LoRA: kinds of adapters, 4 bits, stopping, merging, the hub, dry runs."""

import json
import os
import shutil
from pathlib import Path

import peft
import peft.optimizers
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.sft import main
from recipes.support import adapters, merging, models
from recipes.support.arguments import ModelArguments
from recipes.support.errors import RecipeError
from recipes.support.reporting import read_metrics

QUICK = ("--dataset_name=demo", "--max_train_samples=24", "--max_eval_samples=6", "--num_sample_generations=1")
QUICK += ("--learning_rate=1e-2",)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def error_of(text):
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def tiny_llama(**config):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **config))


KINDS = {
    "dora": (["--use_dora"], {"use_dora": True}),
    "rslora and names": (["--use_rslora", "--lora_target_modules", "q_proj", "0.mlp.up_proj"], {"use_rslora": True}),
    "pattern": (["--lora_target_modules", r".*\.0\..*(q|v)_proj"], {"target_modules": r".*\.0\..*(q|v)_proj"}),
    "bf16": (["--gradient_checkpointing=true", "--bf16=true", "--dtype=bfloat16"], {}),
    "4 bits": (["--load_in_4bit", "--gradient_checkpointing=true", "--packing"], {}),
    "fp4 dora": (["--load_in_4bit", "--bnb_4bit_quant_type=fp4", "--use_bnb_nested_quant", "--use_dora"], {}),
    "tied lm_head": (["--lora_modules_to_save", "lm_head"], {"ensure_weight_tying": True}),
}


def with_slow(cases, *slow):
    marks = {name: [pytest.mark.slow] for name in slow}
    values = {name: case if isinstance(case, tuple) else (case,) for name, case in cases.items()}
    return [pytest.param(*value, id=name, marks=marks.get(name, [])) for name, value in values.items()]


@pytest.mark.long
@pytest.mark.parametrize(("flags", "written"), with_slow(KINDS, "bf16", "fp4 dora", "rslora and names"))
def test_kind_trains_and_merges_into_what_was_measured(flags, written, sft, tmp_path):
    """The merged model, one piece in one type, has the perplexity that was reported of base and adapter."""
    if "--load_in_4bit" in flags:
        pytest.importorskip("bitsandbytes")
    status, output, error = sft(*QUICK, "--per_device_eval_batch_size=6", *flags, "--merge")
    assert status == 0, error
    results = results_of(sft.output_dir)
    assert results["eval_loss"] < results["eval_loss_before"]
    config = json.loads((sft.output_dir / "adapter_config.json").read_text())
    assert {name: config[name] for name in written} == written
    assert "of the largest at most" in output
    assert not (sft.output_dir / "merged.partial").exists()
    again = ["--max_steps=1", "--learning_rate=0", f"--output_dir={tmp_path / 'again'}"]
    status, _, error = sft(*QUICK, *again, model=sft.output_dir / "merged", full=True)
    assert status == 0, error
    tolerance = 0.05 if "--bf16=true" in flags else 1e-3
    perplexity = results_of(tmp_path / "again")["eval_perplexity_before"]
    assert perplexity == pytest.approx(results["eval_perplexity"], rel=tolerance)


def test_lora_plus_gives_the_matrices_b_their_rate(sft):
    """As peft groups them, whose function is for one process; and as the log shows the rate of A."""
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    adapters.set_learning_rates(optimizer, adapters.matrices_b(model), lambda rate: 8.0 * rate)
    expected = peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)

    def rates(built):
        return {id(param): group["lr"] for group in built.param_groups for param in group["params"]}

    assert rates(optimizer) == rates(expected)
    assert set(rates(optimizer).values()) == {1e-3, 8e-3}


def parts(folder, steps=4):
    """The flags of a run in two parts: dropout, a schedule, and several groups must go on as they were."""
    flags = [*QUICK, "--lora_dropout=0.1", "--save_strategy=steps", "--save_steps=2", f"--max_steps={steps}"]
    return [*flags, "--per_device_train_batch_size=2", "--num_sample_generations=0", f"--output_dir={folder}"]


RESUMED = {
    "lora plus": ["--loraplus_lr_ratio=8"],
    "lora plus, torch's adamw": ["--loraplus_lr_ratio=8", "--optim=adamw_torch"],
    "4 bits": ["--load_in_4bit"],
    "dora": ["--use_dora"],
    "packing": ["--packing", "--max_length=64"],
}


@pytest.mark.long
@pytest.mark.parametrize("flags", with_slow(RESUMED, "dora", "lora plus, torch's adamw", "packing"))
def test_resumed_run_ends_bit_for_bit(flags, sft, tmp_path):
    if "--load_in_4bit" in flags:
        pytest.importorskip("bitsandbytes")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    status, _, error = sft(*parts(whole), *flags)
    assert status == 0, error
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    status, output, error = sft(*parts(resumed), *flags, "--resume_from_checkpoint=true")
    assert status == 0, error
    assert "resuming from" in output
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    start = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(start[name], expected[name]) for name in expected)


BAD_ADAPTERS = {
    "no such layer": (["--lora_target_modules", "q_proj", "q_prj"], "lora_target_modules = q_prj: nothing"),
    "pattern for nothing": (["--lora_target_modules", "q.*x"], "down_proj', and none does"),
    "output layer": (
        ["--lora_target_modules", "q_proj", "lm_head"],
        "lora_target_modules = lm_head: the loss is computed from the weights of lm_head itself",
    ),
    "output layer by a pattern": (
        ["--lora_target_modules", r".*(q_proj|lm_head)"],
        "lora_target_modules = .*(q_proj|lm_head): the loss is computed from the weights of lm_head itself",
    ),
    "output layer's parameter": (
        ["--lora_target_parameters", "lm_head.weight"],
        "lora_target_parameters = lm_head.weight: the loss is computed",
    ),
    "parameter of an adapted layer": (
        ["--lora_target_parameters", "self_attn.q_proj.weight"],
        "lora_target_parameters = self_attn.q_proj.weight: Trying to wrap",
    ),
    "parameters with dropout": (
        ["--lora_target_modules", "v_proj", "--lora_target_parameters", "q_proj.weight", "--lora_dropout=0.1"],
        "lora_target_parameters = q_proj.weight: lora.ParamWrapper does not work with lora_dropout",
    ),
    "no pattern": (["--lora_target_modules", "(q_proj"], "is no regular expression"),
    "pattern among names": (["--lora_target_modules", "q_proj", ".*v"], ".*v stands alone or not at all"),
    "no such module": (["--lora_modules_to_save", "head"], "lora_modules_to_save = head: nothing"),
    "no such parameter": (["--lora_target_parameters", "experts.up"], "lora_target_parameters = experts.up: nothing"),
    "no evaluations": (["--early_stopping_patience=1", "--eval_strategy=no"], "counts evaluations"),
    "wrong direction": (["--metric_for_best_model=perplexity"], "give --greater_is_better false"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_what_cannot_work_is_one_error_before_anything_is_written(flags, message, sft):
    status, _, error = sft(*QUICK, *flags)
    assert status == 1
    assert message in error_of(error)
    assert not sft.output_dir.exists()


def test_nothing_to_merge_is_said_before_anything_is_written(sft):
    status, _, error = sft(*QUICK, "--merge", full=True)
    assert status == 1
    assert "merge: without use_peft the result is one model already" in error_of(error)
    assert not sft.output_dir.exists()


def test_error_lists_the_linear_layers():
    with pytest.raises(RecipeError, match=r"The linear layers are q_proj, k_proj, .*down_proj\.$"):
        adapters.require_targets(tiny_llama(), ["query"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "add use_peft, or drop use_dora"),
        ({"load_in_4bit": True}, "add use_peft, or drop load_in_4bit"),
        ({"use_peft": True, "init_lora_weights": "zeros"}, "init_lora_weights = zeros: must be"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio = 0.0: must be above 0"),
        ({"loraplus_lr_ratio": float("nan")}, "loraplus_lr_ratio = nan"),
        ({"use_bnb_nested_quant": True}, "no effect without load_in_4bit"),
    ],
)
def test_adapter_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**options)


@pytest.mark.parametrize(
    ("options", "tp_size", "message"),
    [
        ({"load_in_8bit": True}, 1, "load_in_8bit does not work under FSDP"),
        ({"load_in_4bit": True}, 2, "load_in_4bit does not work under tensor parallelism"),
    ],
)
def test_bits_are_refused_by_the_name_of_the_strategy(options, tp_size, message, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from recipes.support import quantization

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=message):
        quantization.load_options(ModelArguments(use_peft=True, **options), torch.float32, tp_size=tp_size)


def test_fsdp_gets_4_bits_in_tensors_that_it_can_cut(monkeypatch):
    pytest.importorskip("bitsandbytes")
    from recipes.support import quantization

    arguments = ModelArguments(use_peft=True, load_in_4bit=True)
    assert "device_map" in quantization.load_options(arguments, torch.bfloat16, tp_size=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = quantization.load_options(arguments, torch.bfloat16, tp_size=1)
    assert options.keys() == {"quantization_config"}
    assert options["quantization_config"].bnb_4bit_quant_storage == torch.bfloat16


def test_4_bits_stay_as_they_were_loaded_when_evaluated(monkeypatch):
    """bitsandbytes repacks them on a CPU with AVX512-BF16: no gradient gets through when training goes on."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from recipes.support import quantization

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layers = [bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32) for _ in range(2)]
    model = torch.nn.Sequential(*layers).to("cpu").requires_grad_(False)
    quantization.keep_layout(model)
    rows = torch.randn(3, 64)
    model.eval()
    with torch.no_grad():
        evaluated = model(rows)
    model.train()
    trained = model(rows.requires_grad_())
    torch.testing.assert_close(trained, evaluated)
    trained.square().sum().backward()
    assert rows.grad.abs().min() > 0


def test_4_bits_where_a_recipe_does_not_load_them():
    with pytest.raises(RecipeError, match="this recipe does not load its model in 4 bits"):
        models.add_adapter(tiny_llama(), ModelArguments(use_peft=True, load_in_4bit=True), peft.TaskType.CAUSAL_LM)


@pytest.mark.long
def test_early_stopping_keeps_the_best(sft):
    """No evaluation is better by 100 than the first, and the rate is such that the last need not be the best."""
    flags = ["--max_steps=12", "--eval_steps=1", "--save_steps=1", "--early_stopping_patience=2", "--warmup_steps=0"]
    status, _, error = sft(*QUICK[:-1], "--learning_rate=0.5", "--early_stopping_threshold=100", *flags)
    assert status == 0, error
    rows = [row for row in read_metrics(sft.output_dir / "metrics.jsonl") if "eval_loss" in row and row["step"]]
    results = results_of(sft.output_dir)
    assert results["steps"] < 5
    assert results["eval_loss"] == pytest.approx(min(row["eval_loss"] for row in rows), rel=1e-5)


@pytest.mark.long
def test_finished_run_is_merged_and_nothing_else(sft, capsys):
    status, _, error = sft(*QUICK)
    assert status == 0, error
    before = (sft.output_dir / "adapter_model.safetensors").read_bytes()
    metrics = (sft.output_dir / "metrics.jsonl").read_bytes()
    assert main([f"--output_dir={sft.output_dir}", "--merge"]) == 0
    assert (sft.output_dir / "merged" / "model.safetensors").is_file()
    assert (sft.output_dir / "adapter_model.safetensors").read_bytes() == before
    assert (sft.output_dir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.long
def test_merge_that_changes_what_is_said_is_not_kept(sft, monkeypatch):
    status, _, error = sft(*QUICK)
    assert status == 0, error
    scale = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *args: 1.5 * scale(*args))
    with pytest.raises(RecipeError, match="the logits of the merged model differ by"):
        merging.merge(sft.output_dir)
    assert not list(sft.output_dir.glob("merged*"))


def test_dry_run_writes_nothing_and_repeats_as_a_configuration(sft, tmp_path):
    flags = ["--train_file=missing.jsonl", "--lora_r=4", "--loraplus_lr_ratio=4"]
    status, output, error = sft(*flags, "--dry_run")
    assert status == 0, error
    assert list(tmp_path.iterdir()) == []
    config, table = output.split("\nmemory a process")
    rows = dict(line.rsplit("  ", 1) for line in table.splitlines() if "  " in line)
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    trained = int(rows["trained parameters"].split(" of ")[0].replace(",", ""))
    assert rows["gradients"] == f"{4 * trained / 1e6:.2f} MB"
    assert rows["optimizer states"] == f"{8 * trained / 1e6:.2f} MB"
    (tmp_path / "again.yaml").write_text(config)
    _, again, _ = sft(f"--config={tmp_path / 'again.yaml'}", "--dry_run", model=None)
    assert again == output


@pytest.mark.parametrize(
    ("flags", "each"),
    [
        (["--dtype=bfloat16"], 6), (["--dtype=bfloat16", "--optim_args=param_correction=none"], 4),
        (["--dtype=bfloat16", "--optim_args=state_bits=32"], 10), (["--dtype=float32"], 8),
        (["--dtype=bfloat16", "--optim=adamw_torch"], 4), (["--dtype=bfloat16", "--use_peft"], 8),
    ],
    ids=str,
)  # fmt: skip
def test_trained_bfloat16_weights_have_a_correction_unless_it_is_declined(flags, each, sft):
    status, output, error = sft(*flags, "--dry_run", full="--use_peft" not in flags)
    assert status == 0, error
    rows = dict(line.rsplit("  ", 1) for line in output.splitlines() if "  " in line)
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    trained = int(rows["trained parameters"].split(" of ")[0].replace(",", ""))
    assert rows["optimizer states"] == f"{each * trained / 1e6:.2f} MB"
    assert ("param_correction=bits16" in output) == (each in (6, 10))


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "names"), [([], ["loraplus_lr_ratio"]), (["--load_in_4bit"], ["4 bits, nf4"])], ids=["plain", "4 bits"]
)
def test_dry_run_counts_what_the_run_trains(flags, names, sft):
    if flags:
        pytest.importorskip("bitsandbytes")
    _, output, _ = sft(*QUICK, *flags, "--dry_run")
    status, _, error = sft(*QUICK, *flags, "--loraplus_lr_ratio=2")
    assert status == 0, error
    assert results_of(sft.output_dir)["trained_parameters"] in output
    card = (sft.output_dir / "README.md").read_text()
    assert all(name in card for name in names)


@pytest.mark.long
def test_hub_gets_the_result_and_our_card(sft, monkeypatch):
    """The Trainer's own code runs; only what would go over the network is replaced."""
    from huggingface_hub import HfApi, RepoUrl

    pushed = []

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        pushed.append((repo_id, files))

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    hub = ["--push_to_hub", "--hub_model_id=someone/animals", "--hub_strategy=end"]
    status, _, error = sft(*QUICK, *hub, "--optim_args=gamma=0.95")
    assert status == 0, error
    repository, files = pushed[-1]
    assert repository == "someone/animals"
    assert files["adapter_model.safetensors"] == (sft.output_dir / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    for said in (
        "# animals",
        "AdaTAMW",
        "gamma=0.95",
        "| learning_rate | 0.01 |",
        "demo[train]",
        "eval_perplexity",
        "* peft",
    ):
        assert said in card
    assert str(sft.output_dir) not in card


def test_hub_that_cannot_be_reached_stops_the_run_before_it_starts(sft, monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    status, _, error = sft(*QUICK, "--push_to_hub", "--hub_model_id=someone/animals")
    assert status == 1
    assert "push_to_hub: 'someone/animals' cannot be pushed to: no route to host" in error_of(error)
    assert not (sft.output_dir / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif("HF_TAM_DATA" not in os.environ, reason="needs HF_TAM_DATA, a folder with seed_tasks")
def test_real_instructions_are_learnt_as_chats(sft, tmp_path):
    """Real text through the whole path: a template by name, assistant-only loss, packing; the loss falls."""
    source = Path(os.environ["HF_TAM_DATA"]) / "seed_tasks" / "seed_tasks.jsonl"
    tasks = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for task in tasks:
            for case in task["instances"]:
                question = "\n".join(part for part in (task["instruction"], case["input"]) if part)
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": case["output"]}]
                file.write(json.dumps({"messages": turns}) + "\n")
    flags = [
        "--chat_template_path=plain",
        "--packing",
        "--max_steps=10",
        "--learning_rate=1e-2",
        "--max_train_samples=48",
    ]
    sizes = ["--max_eval_samples=8", "--num_sample_generations=1"]
    status, output, error = sft("--train_file", path, *flags, *sizes)
    assert status == 0, error
    assert "longer than 128 tokens and were cut" in error
    assert "packing: " in output
    results = results_of(sft.output_dir)
    assert results["eval_loss"] < results["eval_loss_before"] - 0.2


def test_merge_of_a_run_that_is_not_there_trains_nothing(tmp_path, capsys):
    """A typo in the folder must not start the demo."""
    assert main([f"--output_dir={tmp_path / 'nowhere'}", "--merge"]) == 1
    assert f"merge: there is no finished run in {tmp_path / 'nowhere'}; name the" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.long
@pytest.mark.parametrize("packing", [(), ("--packing",)], ids=["plain", "packed"])
def test_a_test_file_is_measured_once_at_the_end(sft, tmp_path, packing):
    """What it gives is what an evaluation of the saved result gives; nothing else of the run depends on it."""
    records = [{"prompt": f"Question {n}?\nAnswer:", "completion": f" It is {n}."} for n in range(40)]
    files = {}
    for name, part in (("train", records[:24]), ("validation", records[24:32]), ("test", records[32:])):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(record) + "\n" for record in part))
    flags = [f"--train_file={files['train']}", "--num_sample_generations=0", *packing]
    seen = []
    for named in (["validation", "test"], ["test", "validation"]):
        words = [f"--validation_file={files[named[0]]}", f"--test_file={files[named[1]]}"]
        status, _, error = sft(*flags, *words, "--overwrite")
        assert status == 0, error
        seen.append(results_of(sft.output_dir))
    for measure in ("loss", "perplexity", "token_accuracy"):
        assert seen[0][f"test_{measure}"] == pytest.approx(seen[1][f"eval_{measure}"], rel=1e-5)
        assert seen[0][f"eval_{measure}"] == pytest.approx(seen[1][f"test_{measure}"], rel=1e-5)
    assert seen[0]["test_loss"] != seen[0]["eval_loss"]
    assert seen[0]["train_loss"] == seen[1]["train_loss"]
    rows = read_metrics(sft.output_dir / "metrics.jsonl")
    assert sum("test_loss" in row for row in rows) == 1
