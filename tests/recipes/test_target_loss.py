"""Loss and gradient are the same however a step is cut into batches and processes, and eval_loss likewise."""

import json

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

from recipes import classify, seq2seq, vision
from recipes.data import dates, help_desk
from recipes.support import encoder_demo, image_data, image_model, seq2seq_demo
from recipes.support.records import Records
from recipes.support.reporting import read_metrics

QUESTIONS = help_desk.make_records(help_desk.TRAIN, per_intent=4, seed=3)
# targets of one to three dates, so that batches have unequal numbers of tokens
DATES = [
    {"source": row["source"], "target": " and ".join([row["target"]] * (1 + index % 3))}
    for index, row in enumerate(dates.make_records(32, seed=3))
]
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = {
    "bert": lambda: BertConfig(**BERT, **WITHOUT_DROPOUT),
    "distilbert": lambda: DistilBertConfig(
        dim=32, n_layers=1, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
    ),
    "roberta": lambda: RobertaConfig(**BERT, **WITHOUT_DROPOUT, pad_token_id=0),
    "modernbert": lambda: ModernBertConfig(
        **BERT, pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3
    ),
}
FULL, LORA = [], ["--use_peft", "--lora_r=2", "--lora_dropout=0"]
# BatchNorm sees the batch that it is given: these two only in batches that are alike
BATCH_NORM = ("resnet", "mobilenet_v2")


def encoder(name, folder):
    tokenizer = encoder_demo.build_tokenizer([row["text"] for row in QUESTIONS])
    config = ENCODERS[name]()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return classify, [f"--model_name_or_path={folder}", f"--train_file={path}", f"--validation_file={path}"]


def image_classifier(name, folder):
    config = image_model._small_config(name, 32, {"num_labels": 10})
    if name == "mobilenet_v2":
        config.classifier_dropout_prob = 0.0
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    image_model._new_processor(32).save_pretrained(folder)
    return vision, [f"--model_name_or_path={folder}", "--dataset_name=demo"]


def t5(name, folder):
    tokenizer = seq2seq_demo.build_tokenizer([text for row in DATES for text in row.values()])
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **size, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DATES))
    flags = [f"--model_name_or_path={folder}", f"--train_file={path}", f"--validation_file={path}"]
    return seq2seq, [*flags, "--num_sample_generations=0", "--predict_with_generate=false"]


MODELS = {**dict.fromkeys(ENCODERS, encoder), **dict.fromkeys(("vit", *BATCH_NORM), image_classifier), "t5": t5}


def flags_of(batch, accumulation, output_dir, *more):
    cut = [f"--per_device_train_batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"]
    plain = ["--optim=sgd", "--learning_rate=0.1", "--max_steps=2", "--logging_steps=1", "--save_strategy=no"]
    return [
        *cut,
        *plain,
        "--report_to=none",
        "--disable_tqdm=true",
        "--use_cpu=true",
        f"--output_dir={output_dir}",
        *more,
    ]


def losses_and_norms(folder):
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "grad_norm" in row]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def trained(recipe, folder, batch, accumulation, *flags):
    output_dir = folder / f"{batch}x{accumulation}"
    assert recipe.main(flags_of(batch, accumulation, output_dir, *flags)) == 0
    return losses_and_norms(output_dir), json.loads((output_dir / "results.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MODELS if name not in BATCH_NORM])
@pytest.mark.parametrize("what", [FULL, LORA], ids=["full", "lora"])
def test_a_step_is_the_same_in_one_batch_and_in_four(name, what, tmp_path):
    """The second step has 10 records, in batches of 4, 4 and 2."""
    recipe, flags = MODELS[name](name, tmp_path)
    flags += [*what, "--max_train_samples=26"]
    whole, results = trained(recipe, tmp_path, 16, 1, *flags, "--per_device_eval_batch_size=32")
    cut, other_results = trained(recipe, tmp_path, 4, 4, *flags, "--per_device_eval_batch_size=5")
    assert len(whole) == 2
    assert cut == [pytest.approx(row, rel=1e-5) for row in whole]
    # what is evaluated by its last batch too, with no more weight than its records have
    assert other_results["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", BATCH_NORM)
def test_a_step_of_like_batches_is_the_same_in_one_and_in_four(name, tmp_path, monkeypatch):
    """Four images, four times over: BatchNorm sees the same ones in every batch."""
    recipe, flags = image_classifier(name, tmp_path)
    encode = image_data.encode
    monkeypatch.setattr(
        image_data, "encode", lambda split, processor: encode(subset(split, list(range(4)) * 8), processor)
    )
    flags += [*FULL, "--train_sampling_strategy=sequential"]
    whole, _ = trained(recipe, tmp_path, 16, 1, *flags)
    cut, _ = trained(recipe, tmp_path, 4, 4, *flags)
    assert cut == [pytest.approx(row, rel=1e-5) for row in whole]


def subset(split, indices):
    return Records(split.dataset.select(indices), split.source)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_a_step_is_the_same_in_two_processes(name, fork_server, tmp_path):
    """And so is what is measured, on 30 records in batches of 4: two of the last processes' are there already."""
    recipe, flags = MODELS[name](name, tmp_path)
    flags += [*FULL, "--max_train_samples=32", "--max_eval_samples=30"]
    flags += (
        ["--predict_with_generate", "--num_sample_generations=3", "--max_target_length=40"] if name == "t5" else []
    )
    whole, expected = trained(recipe, tmp_path, 16, 1, *flags, "--per_device_eval_batch_size=30")
    words = flags_of(8, 1, tmp_path / "two", *flags, "--per_device_eval_batch_size=4")
    launcher = ["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", 2, "--mixed_precision", "no"]
    script = f"recipes/{recipe.__name__.split('.')[-1]}.py"
    completed = fork_server.run(
        ["-m", "accelerate.commands.launch", *launcher, "--main_process_port", 0, script, *words],
        timeout=200,
        ACCELERATE_TORCH_DEVICE="cpu",
        ACCELERATE_USE_CPU="true",
    )
    assert completed.returncode == 0, completed.stdout[-6000:]
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert "2 processes" in results["strategy"]
    assert losses_and_norms(tmp_path / "two") == [pytest.approx(row, rel=1e-5) for row in whole]
    measured = [key for key in expected if key.startswith("eval_") and not key.endswith(("runtime", "per_second"))]
    assert {key: results[key] for key in measured} == pytest.approx({key: expected[key] for key in measured}, rel=1e-5)
    assert results.get("samples") == expected.get("samples")
