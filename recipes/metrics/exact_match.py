"""Share of texts that equal their reference."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Exact match of whole texts, apart from white space at their ends."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference, without white space at the ends.",
            citation="",
            inputs_description="predictions, references: texts, one each a record.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        equal = [mine.strip() == other.strip() for mine, other in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
