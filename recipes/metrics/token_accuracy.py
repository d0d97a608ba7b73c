"""Share of the target tokens that the model ranks first."""

import datasets
import evaluate
import numpy as np


class TokenAccuracy(evaluate.Metric):
    """Accuracy over tokens; references of -100 are not targets."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of target tokens that were predicted by the largest logit.",
            citation="",
            inputs_description="predictions, references: token ids, already aligned; a reference of -100 is ignored.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        targets = np.asarray(references)
        is_target = targets != -100
        return {"token_accuracy": float(np.mean(np.asarray(predictions)[is_target] == targets[is_target]))}
