"""Overlap of the words of a text with those of its reference."""

import collections

import datasets
import evaluate


class TokenF1(evaluate.Metric):
    """F1 over the words of each text, counted with their multiplicity, averaged over texts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean harmonic mean of the precision and recall of lower-case words separated by white space.",
            citation="",
            inputs_description="predictions, references: texts, one each a record.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [self._f1(mine, other) for mine, other in zip(predictions, references, strict=True)]
        return {"token_f1": sum(scores) / len(scores)}

    def _f1(self, prediction: str, reference: str) -> float:
        mine, other = (collections.Counter(text.lower().split()) for text in (prediction, reference))
        total = mine.total() + other.total()
        return 2 * (mine & other).total() / total if total else 1.0
