"""CHRF of sacrebleu, on its scale of 0 to 100."""

import datasets
import evaluate
import sacrebleu


class CHRF(evaluate.Metric):
    """Corpus CHRF with sacrebleu's own defaults, one reference a text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus CHRF as sacrebleu computes it, 0 to 100.",
            citation="",
            inputs_description="predictions, references: texts, one each a record.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"chrf": sacrebleu.corpus_chrf(predictions, [references]).score}
