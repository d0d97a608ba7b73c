"""What the comparisons of causal models start from: `python -m recipes.comparisons.bases FOLDER`.

Written are FOLDER/llama, FOLDER/gpt2 and FOLDER/t5, small models pretrained on the embedded sentences about animals (a
minute each; the T5 fills gaps in them), and FOLDER/animals with questions about twenty animals to train on, ten others
to choose by and ten more to test on. With --seed_tasks, the 175 hand-written tasks of Self-Instruct (Wang et al. 2023,
https://github.com/yizhongw/self-instruct, Apache 2.0), FOLDER/tasks has their instances, split by task.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import set_seed

from recipes.data import animals
from recipes.support import causal_demo, seq2seq_demo

ARCHITECTURES = ("llama", "gpt2")


def write_splits(folder: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in splits.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def animal_splits() -> dict[str, list[dict[str, str]]]:
    """Questions of prompt and completion; no animal is in two splits."""
    rest, test = animals.make_questions(seed=0)
    per_animal = len(test) // 10
    return {"train": rest[10 * per_animal :], "validation": rest[: 10 * per_animal], "test": test}


def task_splits(path: Path) -> dict[str, list[dict[str, str]]]:
    """Instances of prompt and completion from seed_tasks.jsonl; no task is in two splits."""
    tasks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(tasks)
    parts = {"test": tasks[:30], "validation": tasks[30:55], "train": tasks[55:]}
    return {name: [record for task in part for record in _instances(task)] for name, part in parts.items()}


def _instances(task: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "prompt": "\n".join(part for part in (task["instruction"], case["input"], "Answer:") if part),
            "completion": f" {case['output']}",
        }
        for case in task["instances"]
    ]


def build_t5(folder: Path, *, num_steps: int = 1500) -> None:
    """Teach a T5 of the seq2seq demo's size to fill gaps in the sentences, and save it with its tokenizer."""
    clozes = animals.make_clozes()
    questions, _ = animals.make_questions(seed=0)
    texts = [record[key] for record in clozes for key in ("source", "target")]
    set_seed(0)
    tokenizer = seq2seq_demo.build_tokenizer(texts + [record["prompt"] for record in questions])
    model = seq2seq_demo.build_model(tokenizer)
    torch.set_num_threads(1)  # matrices too small to share
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, cycle_momentum=False)
    draw = random.Random(0)
    for _ in range(num_steps):
        rows = draw.sample(clozes, 64)
        batch = tokenizer([row["source"] for row in rows], padding=True, return_tensors="pt")
        labels = tokenizer([row["target"] for row in rows], padding=True, return_tensors="pt")
        targets = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        model(**batch, labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Write everything; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.comparisons.bases", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where all of it goes")
    parser.add_argument("--seed_tasks", type=Path, metavar="FILE", help="seed_tasks.jsonl of Self-Instruct")
    parsed = parser.parse_args(argv)
    try:
        tasks = None if parsed.seed_tasks is None else task_splits(parsed.seed_tasks)
    except (OSError, ValueError, KeyError) as error:
        print(f"bases: {parsed.seed_tasks} cannot be read as seed_tasks.jsonl: {error}", file=sys.stderr)
        return 2
    write_splits(parsed.folder / "animals", animal_splits())
    if tasks is not None:
        write_splits(parsed.folder / "tasks", tasks)
    build_t5(parsed.folder / "t5")
    for architecture in ARCHITECTURES:
        causal_demo.build_base(parsed.folder / architecture, architecture=architecture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
