"""seq2seq.py: the embedded default, prefixes and lengths, bad records (row 25), and a run that was stopped."""

import json
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from recipes.data import dates
from recipes.seq2seq import main
from recipes.support import seq2seq_demo
from recipes.support.records import load_file as load_records
from recipes.support.reporting import read_metrics
from recipes.support.seq2seq_data import encode
from recipes.support.task_arguments import Seq2SeqDataArguments
from tests.recipes.conftest import recipe_command, recipe_environment
from tests.recipes.test_sft_data import write_lines

ROWS = dates.make_records(40, seed=3)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """A folder with the demo's tokenizer and a random T5 of the flan kind."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = seq2seq_demo.build_tokenizer([text for row in ROWS for text in row.values()])
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **size, **tokens)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def seq2seq(tmp_path, tiny_t5, capsys):
    """Run seq2seq.py in this process; returns status, stdout and stderr."""

    def run(*arguments, model=tiny_t5):
        flags = [f"--output_dir={tmp_path / 'out'}", "--disable_tqdm=true", "--use_cpu=true", "--save_strategy=no"]
        named = [f"--model_name_or_path={model}"] if model else []
        return main([*flags, *named, *map(str, arguments)]), *capsys.readouterr()

    run.output_dir = tmp_path / "out"
    return run


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "least_exact", "least_chrf"), [(4, 0.15, 60), (8, 0.9, 95)])
def test_embedded_default_reads_dates_it_has_not_seen(epochs, least_exact, least_chrf, seq2seq):
    """No date is right by chance, and none was after one epoch, where chrF was below 31."""
    status, output, error = seq2seq("--num_train_epochs", epochs, "--eval_strategy", "no", model=None)
    assert status == 0, error
    assert "This is the demo" in output
    results = results_of(seq2seq.output_dir)
    assert results["optimizer"] == "AdaTAMW"
    assert results["test_exact_match"] > least_exact
    assert results["test_chrf"] > least_chrf
    targets = set(seq2seq_demo.demo_records()[2].dataset["target"])
    assert len(results["samples"]["after"]) == 3
    assert not set(results["samples"]["before"]) & targets
    assert any("test_exact_match" in row for row in read_metrics(seq2seq.output_dir / "metrics.jsonl"))


def test_no_date_is_in_two_splits():
    splits = [set(split.dataset["target"]) for split in seq2seq_demo.demo_records()]
    assert [len(split) for split in splits] == [3000, 200, 400]
    assert not splits[0] & splits[2]
    assert not splits[0] & splits[1]


@pytest.mark.parametrize(
    ("day", "ordinal"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (22, "22nd")]
)
def test_ordinals(day, ordinal):
    assert f"{day}{dates._ending(day)}" == ordinal


@pytest.mark.long
def test_lora_and_every_metric(seq2seq, tmp_path):
    rows = [{"article": row["source"], "summary": row["target"]} for row in ROWS]
    path = write_lines(tmp_path / "train.jsonl", *rows)
    status, _, error = seq2seq(
        *("--train_file", path, "--validation_fraction", "0.25", "--max_steps", 2, "--eval_strategy", "steps"),
        *("--source_column", "article", "--target_column", "summary", "--num_beams", 2),
        *("--use_peft", "--lora_target_modules", "all-linear"),
        *("--text_metrics", "exact_match", "token_f1", "bleu", "chrf"),
    )
    assert status == 0, error
    adapter = json.loads((seq2seq.output_dir / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    assert {name.split(".")[-1] for name in adapter["target_modules"]} == {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}
    assert all(
        f"eval_{name}" in results_of(seq2seq.output_dir) for name in ("exact_match", "token_f1", "bleu", "chrf")
    )


def test_prefix_and_lengths(tiny_t5, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    rows = [{"source": "due on 3 May 2021", "target": "2021-05-03"}, {"source": "due " * 40, "target": "12 " * 30}]
    rows.append({"source": "nothing", "target": " "})
    records = load_records(str(write_lines(tmp_path / "x.jsonl", *rows)))
    data = Seq2SeqDataArguments(source_prefix="read: ", max_length=30, max_target_length=20)
    first, second = encode(records, data, tokenizer, context_length=None)
    assert tokenizer.decode(first["input_ids"]) == "read: due on 3 May 2021</s>"
    assert tokenizer.decode(first["labels"]) == "2021-05-03</s>"
    assert (len(second["input_ids"]), len(second["labels"])) == (30, 20)
    assert second["input_ids"][-1] == second["labels"][-1] == tokenizer.eos_token_id
    error = capsys.readouterr().err
    assert "1 of 3 sources of" in error
    assert "1 of 3 targets of" in error
    assert "1 of 3 records of" in error


A = {"source": "3 May 2021", "target": "2021-05-03"}
BAD_FILES = {
    "null": ([A, {**A, "target": None}], (), "x.jsonl, line 2: 'target' must be text, not None"),
    "no column": ([A], ("--target_column", "summary"), "has no column 'summary' (--target_column)"),
    "nothing to learn": ([{**A, "target": ""}], (), "nothing to learn"),
    "nothing to measure on": ([A], (), "nothing to measure on"),
    "no evaluation data": ([A], ("--eval_strategy", "epoch"), "eval_strategy needs data"),
}


@pytest.mark.parametrize(("rows", "flags", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_one_clear_error_before_anything_is_written(rows, flags, message, seq2seq, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *rows)
    status, _, error = seq2seq("--train_file", path, *flags)
    assert status == 1
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not seq2seq.output_dir.exists()


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        (["--train_file", "nowhere.jsonl"], "any", "nowhere.jsonl: no such file"),
        (["--dataset_name", "demo"], "nobody/nothing", "model 'nobody/nothing' cannot be loaded"),
        (["--dataset_name", "demo"], None, "no model: data was named"),
        (["--dataset_name", "demo", "--use_peft"], "demo", "starts from random weights"),
    ],
)
def test_what_was_named_is_never_replaced(flags, model, message, seq2seq):
    status, _, error = seq2seq(*flags, model=model)
    assert status == 1
    assert message in error
    assert not seq2seq.output_dir.exists()


def test_metric_that_does_not_exist_is_named(seq2seq, capsys):
    with pytest.raises(SystemExit):
        seq2seq("--dataset_name", "demo", "--text_metrics", "rouge")
    assert "unknown metric 'rouge'" in capsys.readouterr().err


def test_directory_in_use_is_refused(seq2seq):
    seq2seq.output_dir.mkdir()
    (seq2seq.output_dir / "mine").touch()
    status, _, error = seq2seq("--dataset_name", "demo")
    assert status == 1
    assert "is not empty" in error


@pytest.mark.slow
def test_run_stopped_by_ctrl_c_continues_bit_for_bit(tiny_t5, tmp_path):
    """Stopped in a process of its own; dropout is T5's own 0.1."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [
        f"--model_name_or_path={tiny_t5}",
        "--dataset_name=demo",
        "--max_steps=60",
        "--disable_tqdm=true",
    ]
    flags += ["--use_cpu=true", "--logging_steps=1"]
    flags += ["--max_train_samples=64", "--num_sample_generations=0"]
    flags += ["--save_strategy=steps", "--save_steps=60", "--predict_with_generate=false"]
    process = subprocess.Popen(
        recipe_command("seq2seq.py", *flags, f"--output_dir={stopped}"),
        env=recipe_environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not any(row["step"] >= 5 for row in read_metrics(stopped / "metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGINT, error[-2000:]
    assert "Traceback" not in error
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process had
    assert main([*flags, f"--output_dir={whole}"]) == 0
    assert main([*flags, f"--output_dir={stopped}", "--resume_from_checkpoint=true"]) == 0
    torch.set_num_threads(num_threads)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
