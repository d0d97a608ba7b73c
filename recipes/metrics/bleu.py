"""BLEU of sacrebleu, on its scale of 0 to 100."""

import datasets
import evaluate
import sacrebleu


class BLEU(evaluate.Metric):
    """Corpus BLEU with sacrebleu's own defaults, one reference a text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU as sacrebleu computes it, 0 to 100.",
            citation="",
            inputs_description="predictions, references: texts, one each a record.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score}
