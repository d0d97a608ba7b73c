"""What generated text is measured by."""

from typing import Any

from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from recipes.support.encoding import IGNORED
from recipes.support.metrics import load_metrics


def make_compute_metrics(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Any:
    """Return the function that gives the Trainer the metrics `names` of what was generated."""
    metrics = load_metrics(*names)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        written, wanted = (decode(ids, tokenizer) for ids in (prediction.predictions, prediction.label_ids))
        results = [metric.compute(predictions=written, references=wanted) for metric in metrics]
        return {name: value for result in results for name, value in result.items()}

    return compute_metrics


def decode(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode rows of token ids, padded with `IGNORED` or not at all, without special tokens."""
    rows = [[tokenizer.pad_token_id if token == IGNORED else int(token) for token in row] for row in ids]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def without_timing(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out how long an evaluation took."""
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "_time"))}


def evenly(dataset: Dataset, count: int) -> Dataset:
    """Return `count` records, spread evenly over the dataset."""
    count = min(count, len(dataset))
    return dataset.select([index * len(dataset) // count for index in range(count)])
