"""Tokens per second inside the Trainer, `adatamw` beside `adamw_torch_fused`.

The LoRA demo of `sft.py`: its model, data, batches and arguments, without evaluation and checkpoints. In one run the
two optimizers take turns, a step each; a step's time is that from the end of the one before, so that everything the
Trainer does is in it. On a GPU a step ends when the GPU has done it, so that no step pays for another.

    python -m recipes.results.trainer_speed --pairs 400 --json recipes/results/bench-trainer.json
    python -m recipes.results.trainer_speed --size 1b --pairs 150 --json recipes/results/bench-trainer-gpu.json
    python -m recipes.results.trainer_speed --profile
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

import hf_tam
from hf_tam.lab.bench.machine import describe_machine, load_average
from hf_tam.lab.bench.statistics import pair_ratio
from recipes import sft
from recipes.support import causal_data, causal_demo, causal_run
from recipes.support.config import parse_recipe_arguments

OURS, THEIRS = "adatamw", "adamw_torch_fused"
SIZES = {
    "demo": "the demo's own model of 0.9M parameters",
    "1b": "Llama-3.2-1B's sizes, random weights, bf16, with the demo's words: for a GPU",
}
_WARM_UP_PAIRS = 5


class _ProfileSteps(TrainerCallback):
    """Hands the end of every step to a profiler."""

    def __init__(self, profiler: profile) -> None:
        self.profiler = profiler

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.profiler.step()


def build_model(size: str, folder: Path) -> None:
    """Write model and tokenizer of one of `SIZES` to `folder`."""
    causal_demo.build_base(folder, show_progress=False, **({} if size == "demo" else {"num_steps": 1}))
    if size == "1b":
        config = AutoConfig.from_pretrained(folder)
        config.update(
            {
                "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 64,
            }
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def prepare(optim: str, base: Path, *, size: str, steps: int, log_torque: bool) -> Trainer:
    """Return a Trainer for the demo of `sft.py`, as that script would build it.

    Args:
        optim: For --optim.
        base: What `build_model` wrote.
        size: Which one of `SIZES` that is.
        steps: How many to train.
        log_torque: Whether the torque is read at logging steps, as it is in the recipes.
    """
    words = [f"--optim={optim}", f"--max_steps={steps}", f"--output_dir={base.parent / 'run'}", "--disable_tqdm=true"]
    words += ["--eval_strategy=no", "--eval_on_start=false", "--save_strategy=no"]
    words += ["--optim_args=log_torque=true"] if log_torque and optim == OURS else []
    words += ["--use_cpu=false", "--bf16=true", "--lora_r=16"] if size == "1b" else []
    groups = parse_recipe_arguments(sft.make_parser(), words, demo_config=sft.DEMO_CONFIG)
    groups[1].model_name_or_path = str(base)
    splits = causal_data.load_splits(groups, causal_data.demo_questions)
    tokenizer = causal_run.load_tokenizer(groups)
    encoded = causal_data.encode(splits, groups, tokenizer)
    model, _ = causal_run.add_adapter(causal_run.load_model(groups), groups)
    trainer = sft.make_trainer(model, tokenizer, groups, {name: split.dataset for name, split in encoded.items()})
    trainer.remove_callback(PrinterCallback)
    return trainer


class _TakeTurns(TrainerCallback):
    """Lets one optimizer take a step, then the other, and keeps the time from the end of a step to the next one's."""

    def __init__(self, trainer: Trainer, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.trainer, self.optimizers = trainer, optimizers
        self.turns: list[str] = []
        self.ends: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Ours, theirs, theirs, ours: within a pair neither is always the first.
        self.turns.append((OURS, THEIRS, THEIRS, OURS)[state.global_step % 4])
        self.trainer.optimizer.optimizer = self.optimizers[self.turns[-1]]  # inside accelerate's wrapper

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def compare(base: Path, *, size: str, num_pairs: int, log_torque: bool) -> dict[str, Any]:
    """Train once, with both optimizers on the same adapter, a step each in turns.

    Returns:
        Tokens per second of each step, pair by pair, and the ratio: above 1 where `adatamw` is faster.
    """
    trainer = prepare(OURS, base, size=size, steps=2 * (num_pairs + _WARM_UP_PAIRS), log_torque=log_torque)
    tokens, collate = [], trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    params = [param for param in trainer.model.parameters() if param.requires_grad]
    options = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
    ours = hf_tam.AdaTAMW(params, **options)
    ours.attach(trainer.model)
    turns = _TakeTurns(trainer, {OURS: ours, THEIRS: torch.optim.AdamW(params, fused=True, **options)})
    trainer.optimizer = ours
    trainer.add_callback(turns)
    trainer.train()
    rates: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for step in range(2 * _WARM_UP_PAIRS, len(turns.ends)):
        rates[turns.turns[step]].append(tokens[step] / (turns.ends[step] - turns.ends[step - 1]))
    sizes = {"tensors": len(params), "elements": sum(param.numel() for param in params)}
    return {**sizes, "tokens_per_second": rates, "ratio": pair_ratio(rates[OURS], rates[THEIRS])._asdict()}


def print_profile(base: Path, *, size: str, steps: int) -> None:
    """Print where the time of a LoRA step goes: torch.profiler's table over `steps` steps after a warm-up."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
        schedule=schedule(wait=0, warmup=5, active=steps),
        acc_events=True,
    ) as profiler:
        trainer = prepare(OURS, base, size=size, steps=steps + 5, log_torque=False)
        trainer.add_callback(_ProfileSteps(profiler))
        trainer.train()
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))
    total = sum(event.self_cpu_time_total for event in averages)
    step = sum(event.cpu_time_total for event in averages if event.key.startswith("Optimizer.step#"))
    print(f"Optimizer.step: {100 * step / total:.1f}% of the CPU time of a step")


def main(argv: list[str] | None = None) -> int:
    """Compare or profile; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m recipes.results.trainer_speed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help=f"1b: {SIZES['1b']}; default: demo")
    parser.add_argument("--pairs", type=int, default=400, help="of steps; default: 400")
    parser.add_argument("--steps", type=int, default=40, help="with --profile; default: 40")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--log_torque", action="store_true", help="log the torque too, as the recipes do")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each run's rate included")
    parsed = parser.parse_args(argv)
    if parsed.pairs < 1 or parsed.steps < 1 or parsed.threads < 1:
        parser.error("--pairs, --steps and --threads must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        build_model(parsed.size, base)
        torch.set_num_threads(parsed.threads)
        if parsed.profile:
            print_profile(base, size=parsed.size, steps=parsed.steps)
            return 0
        before = load_average()
        result = compare(base, size=parsed.size, num_pairs=parsed.pairs, log_torque=parsed.log_torque)
    ratio = result["ratio"]
    interval = f"{ratio['low']:.3f} .. {ratio['high']:.3f}"
    print(f"{OURS} / {THEIRS}: {ratio['median']:.3f} ({interval}) of the tokens per second")
    if parsed.json is not None:
        facts = {
            "command": shlex.join(["python", "-m", "recipes.results.trainer_speed", *argv]),
            "machine": describe_machine(),
            "model": SIZES[parsed.size],
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": parsed.threads,
            "load_average_before": before,
            **result,
            "load_average_after": load_average(),
        }
        parsed.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
