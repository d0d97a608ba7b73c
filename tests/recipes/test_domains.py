"""domains.py: what is trained when, that the optimizer goes on, and what is measured."""

import json

import numpy as np
import pytest
from datasets import Dataset

from recipes import domains
from recipes.support import domain_sequence
from recipes.support.errors import RecipeError
from recipes.support.records import Records


def records(*names):
    return Records(
        Dataset.from_dict({"text": [f"text {n}" for n in range(len(names))], "domain": list(names)}), "made"
    )


def test_each_domain_gets_its_own_records():
    split = records("b", "a", "b", "c", "a")
    names = domain_sequence.domains_of(split, "domain")
    assert names == ["a", "b", "c"]
    parts = domain_sequence.cut(split, split.dataset, "domain", names)
    assert [part["text"][:] for part in parts] == [["text 1", "text 4"], ["text 0", "text 2"], ["text 3"]]


@pytest.mark.parametrize(
    ("found", "message"),
    [(("a", "d"), "record 2: no training record is of the domain 'd'"), (("a", "a"), "no record of the domain 'b'")],
)
def test_a_domain_that_does_not_fit_is_named(found, message):
    split = records(*found)
    with pytest.raises(RecipeError, match=message):
        domain_sequence.cut(split, split.dataset, "domain", ["a", "b"])


def test_metrics():
    nan = np.nan
    accuracies = np.array([[0.9, nan, nan], [0.4, 0.8, nan], [0.2, 0.5, 0.7]])
    metrics = domain_sequence.domain_metrics(accuracies, prefix="test")
    assert metrics["test_mean_accuracy"] == pytest.approx(0.8)
    assert metrics["test_forgetting"] == pytest.approx(((0.9 - 0.4) + (0.8 - 0.5)) / 2)
    assert metrics["test_final_accuracy"] == pytest.approx((0.2 + 0.5 + 0.7) / 3)


def test_the_demo_learns_each_domain_and_forgets_the_last(tmp_path, monkeypatch, capsys):
    trainers = []
    through = domains.train_through
    monkeypatch.setattr(
        domains, "train_through", lambda trainer, *rest: (trainers.append(trainer), through(trainer, *rest))[1]
    )
    assert domains.main([f"--output_dir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimizer"] == "AdaTAMW"
    (trainer,) = trainers
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {results["steps"]}
    assert min(results["eval_task_accuracies"]) > 0.8  # of eight intents
    assert results["eval_forgetting"] > 0.5  # nothing reminds it of what was before
    assert results["eval_final_accuracy"] < results["eval_mean_accuracy"]
    assert "test final accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_strategy=epoch"], "a sequence of domains is not resumed"),
        (["--domain_column=text"], "no training record is of the domain"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, tmp_path, capsys):
    assert domains.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()
