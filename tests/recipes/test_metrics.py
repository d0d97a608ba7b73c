"""The metric modules against numbers worked out by hand."""

import math

import pytest

from recipes.support.metrics import load_metrics


def compute(name, predictions, references):
    (metric,) = load_metrics(name)
    return metric.compute(predictions=predictions, references=references)[name]


def test_accuracy():
    assert compute("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_macro_f1_weighs_classes_alike():
    # Class 0: precision 3/4, recall 1, F1 6/7. Class 1: precision 1, recall 1/2, F1 2/3.
    assert compute("macro_f1", [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]) == pytest.approx((6 / 7 + 2 / 3) / 2)


def test_macro_f1_of_a_class_never_predicted_is_zero():
    assert compute("macro_f1", [0, 0], [0, 1]) == pytest.approx((2 / 3 + 0) / 2)


def test_token_accuracy_ignores_what_is_no_target():
    assert compute("token_accuracy", [5, 6, 7], [5, -100, 8]) == 0.5


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert compute("perplexity", [math.log(8)] * 3 + [100.0], [1, 2, 3, -100]) == pytest.approx(8, rel=1e-6)


def test_perplexity_weighs_tokens_alike():
    assert compute("perplexity", [1.0, 1.0, 4.0], [1, 2, 3]) == pytest.approx(math.exp(2.0), rel=1e-6)


def test_exact_match_is_of_whole_texts():
    assert compute("exact_match", ["a b", "a b ", "a"], ["a b", "a b", "a b"]) == pytest.approx(2 / 3)


def test_token_f1_counts_words_with_their_multiplicity():
    # Two of three words of the first are among the four of its reference: F1 = 2 * 2 / 7. The second has none.
    assert compute("token_f1", ["a A b", "x"], ["a b c d", "y"]) == pytest.approx((4 / 7 + 0) / 2)


def test_token_f1_of_two_empty_texts_is_one():
    assert compute("token_f1", [""], [""]) == 1.0


def test_bleu_and_chrf_are_those_of_sacrebleu():
    texts = ["the owl eats rodents at night in the old forest"]
    assert compute("bleu", texts, texts) == pytest.approx(100)
    assert compute("chrf", texts, texts) == pytest.approx(100)
    # No character in common, so no n-gram of any order.
    assert compute("bleu", ["aaa"], ["zzz"]) == compute("chrf", ["aaa"], ["zzz"]) == 0.0


def test_spikes_are_told_from_a_rise():
    """Beside the median of the twenty before: a single peak counts, a slow rise to ten times as much does not."""
    from recipes.support.spikes import grad_norm_metrics

    def logged(norms):
        return [{"loss": 1.0}, *({"grad_norm": norm} for norm in norms)]

    rising = [1.0 + 0.05 * step for step in range(200)]
    assert grad_norm_metrics(logged(rising)) == {"grad_norm_max": rising[-1], "grad_norm_spikes": 0.0}
    with_peaks = [*([1.0] * 30), 3.1, *([1.0] * 30), 2.9, float("nan"), 1.0]
    assert grad_norm_metrics(logged(with_peaks))["grad_norm_spikes"] == 2.0
    assert grad_norm_metrics(logged([9.0] * 20)) == {}
