"""CLINC150 as files that `classify.py` reads: `python -m recipes.data.clinc150 data_full.json FOLDER`.

The corpus (Larson et al. 2019, https://github.com/clinc/oos-eval, CC BY 3.0) is one JSON file of [text, intent] pairs.
Written are train.csv, validation.csv and test.csv with the columns text and label: the 150 intents, without the
out-of-scope texts.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path

SPLITS = {"train": "train", "validation": "val", "test": "test"}


def convert(
    source: Path,
    folder: Path,
    *,
    domains: Path | None = None,
    train_per_intent: int | None = None,
    eval_per_intent: int | None = None,
) -> dict[str, int]:
    """Write the three files.

    Args:
        source: data_full.json, or another file of the corpus.
        folder: Where they go; made if it is not there.
        domains: domains.json, which lists the intents of each domain: then there is a column `domain` too.
        train_per_intent: Keep the first so many of each intent to train on; None: all.
        eval_per_intent: The same for validation and for test.

    Returns:
        How many records each split has.

    Raises:
        ValueError: `source` is not the corpus.
    """
    content = json.loads(source.read_text(encoding="utf-8"))
    if missing := [name for name in SPLITS.values() if name not in content]:
        raise ValueError(f"{source} has no split {missing[0]!r}: pass data_full.json of CLINC150")
    listed = {} if domains is None else json.loads(domains.read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in listed.items() for intent in intents}
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, split in SPLITS.items():
        kept = _first(content[split], train_per_intent if name == "train" else eval_per_intent)
        counts[name] = len(kept)
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", *(["domain"] if domain_of else [])])
            for text, intent in kept:
                writer.writerow([text, intent, *([domain_of[intent]] if domain_of else [])])
    return counts


def _first(pairs: list[list[str]], count: int | None) -> list[list[str]]:
    """The first `count` of each intent, in order."""
    seen: Counter[str] = Counter()
    kept = []
    for text, intent in pairs:
        if count is None or seen[intent] < count:
            kept.append([text, intent])
        seen[intent] += 1
    return kept


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.data.clinc150", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="data_full.json")
    parser.add_argument("folder", type=Path, help="for train.csv, validation.csv and test.csv")
    parser.add_argument("--domains", type=Path, metavar="FILE", help="domains.json, for a column `domain`")
    parser.add_argument("--train_per_intent", type=int, metavar="N", help="keep N of each intent to train on")
    parser.add_argument("--eval_per_intent", type=int, metavar="N", help="the same for validation and test")
    parsed = parser.parse_args(argv)
    try:
        counts = convert(**vars(parsed))
    except (OSError, ValueError, KeyError) as error:
        print(f"clinc150: {error}", file=sys.stderr)
        return 2
    print(f"{parsed.folder}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
