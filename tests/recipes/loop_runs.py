"""What the tests of no_trainer.py train, and how they run it: here, and launched with a file of recipes/accelerate."""

import json
import random
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.recipes.conftest import ROOT
from tests.recipes.tiny_models import build_tokenizer

SCRIPT = ROOT / "recipes" / "no_trainer.py"
NUM_RECORDS, NUM_EVALUATED = 18, 6  # of steps of 8, and batches of 4, the last leaves one of two processes without
OPTIONS = {"max_steps": 5, "learning_rate": 3e-3, "logging_steps": 1, "save_steps": 2, "use_peft": "true"}


def build_inputs(folder):
    """Write a Llama that tensor parallelism can cut in two, its tokenizer, and pairs of several lengths to learn."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]

    def text(most):
        return " ".join(draw.choices(words, k=draw.randint(2, most)))

    for name, count in (("train", NUM_RECORDS), ("validation", NUM_EVALUATED)):
        write_records(folder / f"{name}.jsonl", [{"prompt": text(4), "completion": text(9)} for _ in range(count)])
    files = {f"{name}_file": folder / f"{name}.jsonl" for name in ("train", "validation")}
    return {"model_name_or_path": folder / "model", **files}


def write_records(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def flags(options):
    return [f"--{name}={value}" for name, value in options.items()]


def run_here(options):
    """Run the script in this process on one CPU; returns its names."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    before = sys.argv
    sys.argv = [str(SCRIPT), *flags(options)]
    try:
        return runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before


def launch(fork_server, strategy, options, reports, *more, precision="no"):
    """Run the script with the file of a strategy on the CPU; returns what each process reports."""
    launcher = ["--config_file", f"recipes/accelerate/{strategy}.yaml", *strategy.launch]
    launcher += ["--num_processes", strategy.num_processes, "--mixed_precision", precision]
    launcher += ["--main_process_port", 0] if strategy.num_processes > 1 else []
    reports.mkdir()
    completed = fork_server.run(
        ["-m", "accelerate.commands.launch", *launcher, SCRIPT, *flags(options), *more],
        timeout=150,
        STRATEGY_REPORTS=str(reports),
        ACCELERATE_TORCH_DEVICE="cpu",
        **strategy.environment,
    )
    assert completed.returncode == 0, completed.stdout[-8000:]
    return [json.loads((reports / f"rank-{rank}.json").read_text()) for rank in range(strategy.num_processes)]


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_rows(folder, expected, *, tolerance):
    """The losses, and what is read of the torque, of every step."""
    rows, others = rows_of(folder), rows_of(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "eval_loss", "torque/damping_mean"):
            if name in row:
                assert abs(row[name] - other[name]) <= tolerance, (row["step"], name)


def assert_same_adapter(folder, expected, *, tolerance):
    adapter, other = adapter_of(folder), adapter_of(expected)
    assert adapter.keys() == other.keys()
    assert adapter
    assert max(float((adapter[name] - other[name]).abs().max()) for name in other) <= tolerance
