"""shift.py: what changes from task to task, what goes on, and what is measured."""

import json

import numpy as np
import pytest
import torch

from recipes import shift
from recipes.support import label_shift
from recipes.support.label_shift import Labels, sequence_metrics


@pytest.mark.parametrize(("fraction", "moved"), [(0.0, 0), (0.4, 4), (1.0, 10)])
def test_a_share_of_the_labels_is_permuted(fraction, moved):
    labels = Labels(10, num_tasks=30, fraction=fraction, seed=3)
    assert (labels.tables[0] == np.arange(10)).all()
    changed = (labels.tables != np.arange(10)).sum(1)
    assert changed.max() <= moved
    assert changed[1:].mean() >= 0.6 * moved  # a permutation may leave some where they are
    assert all(sorted(table) == list(range(10)) for table in labels.tables)
    assert (labels.tables == Labels(10, num_tasks=30, fraction=fraction, seed=3).tables).all()
    if moved:
        assert (labels.tables != Labels(10, num_tasks=30, fraction=fraction, seed=4).tables).any()


def test_batches_have_the_labels_of_the_task():
    labels = Labels(10, num_tasks=3, fraction=1.0, seed=0)
    rows = [{"pixel_values": torch.zeros(1, 2, 2), "labels": label} for label in (3, 7)]
    for task in range(3):
        assert labels.collator(task)(rows)["labels"].tolist() == labels.tables[task][[3, 7]].tolist()


def test_metrics_of_a_sequence():
    """Rows are what was known after a task, columns the tasks asked for."""
    accuracies = np.array([[0.9, 0.3, 0.1], [0.4, 0.8, 0.2], [0.0, 0.5, 0.7]])
    metrics = sequence_metrics(accuracies, prefix="test")
    assert metrics["test_mean_accuracy"] == pytest.approx(0.8)
    assert metrics["test_late_accuracy"] == pytest.approx(0.75)
    assert metrics["test_forgetting"] == pytest.approx(((0.9 - 0.4) + (0.8 - 0.5)) / 2)
    assert metrics["test_task_accuracies"] == [0.9, 0.8, 0.7]


@pytest.mark.long
def test_the_optimizer_goes_on_and_the_labels_are_learnt(tmp_path, monkeypatch, capsys):
    trainers = []
    through = label_shift.train_through
    monkeypatch.setattr(
        shift, "train_through", lambda trainer, *rest: (trainers.append(trainer), through(trainer, *rest))[1]
    )
    flags = ["--num_tasks=3", "--flip_fraction=1.0", f"--output_dir={tmp_path}", "--num_train_epochs=2"]
    assert shift.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimizer"] == "AdaTAMW"
    (trainer,) = trainers
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {results["steps"]} == {3 * 2 * 38}
    assert min(results["test_task_accuracies"]) > 0.5  # chance is 0.1, and so is the answer by the labels before
    assert results["test_forgetting"] > 0.4
    assert results["eval_mean_accuracy"] == pytest.approx(np.mean(results["eval_task_accuracies"]), abs=1e-6)
    assert "test mean accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_tasks=1"], "num_tasks = 1: must be at least 2"),
        (["--flip_fraction=1.5"], "flip_fraction = 1.5: must be from 0 to 1"),
        (["--save_strategy=epoch"], "a sequence of tasks is not resumed"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, tmp_path, capsys):
    try:
        status = shift.main([*flags, f"--output_dir={tmp_path / 'out'}"])
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()
