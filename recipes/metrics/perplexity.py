"""Perplexity of the target tokens."""

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """Exponential of the mean negative log-likelihood of a token, every token of the evaluation weighing the same."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp(mean negative log-likelihood of a target token), natural logarithm.",
            citation="",
            inputs_description="predictions: negative log-likelihood of each token in nats; "
            "references: the token ids; tokens with a reference of -100 are ignored.",
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        is_target = np.asarray(references) != -100
        return {"perplexity": float(np.exp(np.mean(np.asarray(predictions, dtype=np.float64)[is_target])))}
