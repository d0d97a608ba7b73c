"""domains.py: what is trained when, that the optimizer goes on, and what is measured."""

import json

import numpy as np
import pytest
import torch
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


@pytest.mark.long
def test_the_demo_learns_each_domain_with_one_optimizer(tmp_path, monkeypatch, capsys):
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
    assert min(results["eval_task_accuracies"]) > 0.8
    assert "test final accuracy" in capsys.readouterr().out


PARTS = [Dataset.from_dict({"labels": [0, 2, 0]}), Dataset.from_dict({"labels": [1, 3]})]
NAMES = ["hear", "lend", "read", "return"]


def test_a_label_is_told_from_those_of_its_domain():
    candidates = domain_sequence.candidate_labels({"train": PARTS}, NAMES, ["a", "b"])
    assert candidates.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]


def test_a_label_of_two_domains_is_named():
    parts = [*PARTS, Dataset.from_dict({"labels": [2]})]
    with pytest.raises(RecipeError, match="the label 'read' is of two domains, 'a' and 'c'"):
        domain_sequence.candidate_labels({"train": parts}, NAMES, ["a", "b", "c"])


def test_a_label_that_is_elsewhere_in_another_domain_is_named():
    parts = {"train": PARTS, "test": [PARTS[0], Dataset.from_dict({"labels": [1, 2]})]}
    with pytest.raises(RecipeError, match="test has the label 'read' in the domain 'b', where no training record"):
        domain_sequence.candidate_labels(parts, NAMES, ["a", "b"])


def test_a_label_that_nobody_has_is_nobodys_candidate():
    candidates = domain_sequence.candidate_labels({"train": PARTS}, [*NAMES, "never"], ["a", "b"])
    assert not candidates[:4, 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_sees_the_labels_of_the_domain_alone(dtype):
    """It is the cross-entropy over a domain's own logits, and moves no other logit."""
    candidates = domain_sequence.candidate_labels({"train": PARTS}, NAMES, ["a", "b"])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    columns = torch.tensor([[0, 2], [1, 3], [0, 2], [1, 3], [0, 2]])
    expected = torch.nn.functional.cross_entropy(logits.float().gather(1, columns), labels // 2)

    narrow = domain_sequence.among(candidates)
    whole = torch.nn.functional.cross_entropy(narrow(logits.float(), labels), labels)
    torch.testing.assert_close(whole, expected)
    (gradient,) = torch.autograd.grad(whole, logits)
    assert torch.equal(gradient != 0, candidates[labels])


@pytest.mark.slow
def test_a_known_domain_is_forgotten_less(tmp_path):
    """Five seeds forgot 0.21 to 0.29 of it, and 0.56 to 0.98 where a label is told from all. Gradients accumulate."""
    results = []
    for scenario in ("class_incremental", "task_incremental"):
        flags = [f"--scenario={scenario}", "--per_device_train_batch_size=16", "--gradient_accumulation_steps=2"]
        assert domains.main([*flags, f"--output_dir={tmp_path / scenario}"]) == 0
        results.append(json.loads((tmp_path / scenario / "results.json").read_text()))
    one_of_all, one_of_three = results
    assert one_of_all["steps"] == one_of_three["steps"] == 240
    assert one_of_three["eval_forgetting"] < one_of_all["eval_forgetting"] - 0.1
    assert one_of_three["eval_final_accuracy"] > one_of_all["eval_final_accuracy"] + 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save_strategy=epoch"], "a sequence of domains is not resumed"),
        (["--label_smoothing_factor=0.1"], "label_smoothing_factor 0.1 would smooth over the labels of other"),
        (["--domain_column=text"], "no training record is of the domain"),
    ],
)
def test_bad_arguments_are_one_line(flags, message, tmp_path, capsys):
    assert domains.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()
