"""What a classifier is measured by: accuracy and macro-F1."""

from typing import Any

import numpy as np
from transformers import EvalPrediction

from recipes.support.metrics import load_metrics


def make_compute_metrics() -> Any:
    """Return the function that gives the Trainer accuracy and macro-F1."""
    metrics = load_metrics("accuracy", "macro_f1")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.argmax(prediction.predictions, axis=-1)
        results = [metric.compute(predictions=predicted, references=prediction.label_ids) for metric in metrics]
        return {name: value for result in results for name, value in result.items()}

    return compute_metrics
