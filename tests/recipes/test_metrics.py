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
