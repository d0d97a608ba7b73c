"""What the pictures of `hf-tam report` show: legends tell the runs apart, rewards are drawn, NaN is marked."""

import html
import json
import math
import re

import numpy as np
import pytest

from hf_tam import cli
from hf_tam.lab.report.looks import THEMES, curve_look

pytest.importorskip("matplotlib")
NAN = math.nan
STEPS = [2, 4, 6, 8]


def write_run(folder, *, logs=None, torque=None, state=False, arguments=None, **settings):
    """A run of a recipe with these settings, else (`state`) of a Trainer, else one that was killed."""
    folder.mkdir(parents=True)
    rows = logs or [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "eval_loss": 1.0} for step in STEPS]
    if state:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows, "max_steps": 8}))
    else:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if arguments is not None:
        (folder / "arguments.json").write_text(json.dumps(arguments))
    elif not state:
        (folder / "results.json").write_text(json.dumps({"optimizer": "AdaTAMW", "settings": {"A": settings}}))
    if torque:
        (folder / "torque.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in torque))
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs `hf-tam report`; returns the light figures in their order, and the page without tags and pictures."""
    from matplotlib.figure import Figure

    def make(*folders, more=()):
        drawn = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, target, **_: drawn.append(figure))
        page = tmp_path / "report.html"
        status = cli.main(["report", *map(str, folders), "--output", str(page), *more])
        assert (status, capsys.readouterr().err) == (0, "")
        make.titles = re.findall(r"<h2>(.*?)</h2>", page.read_text())
        make.cells = {
            html.unescape(name): re.findall(r"<td>(.*?)</td>", row)
            for name, row in re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page.read_text(), flags=re.DOTALL)
        }
        text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))
        return drawn[:: len(THEMES)], " ".join(text.split())

    return make


def legend(figure):
    """The labels, with their lines joined again."""
    return [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]


def curve(axis, number=0):
    """Steps and values of a curve; what marks NaN, and faint lines, are none."""
    lines = [line for line in axis.lines if line.get_gid() is None and len(line.get_xdata()) and
             line.get_transform().contains_branch_seperately(axis.transData) == (True, True) and
             list(line.get_xdata()) != [0, 1]]  # fmt: skip
    return list(lines[number].get_xdata()), list(lines[number].get_ydata())


def marks(axis):
    """The steps at which values are marked, by their kind."""
    found = [line for line in axis.lines if line.get_gid() is not None]
    return {line.get_gid(): [*map(float, line.get_xdata())] for line in found}


def test_folders_of_one_name_differ_by_their_setting_and_their_path(tmp_path, report):
    runs = [
        write_run(tmp_path / name / "out", learning_rate=rate, seed=0) for name, rate in (("a", 1e-4), ("b", 3e-4))
    ]
    figures, _ = report(*runs)
    assert legend(figures[0]) == ["learning_rate=0.0001 (a/out)", "learning_rate=0.0003 (b/out)"]


def test_plain_trainers_differ_by_the_rate_that_they_logged(tmp_path, report):
    for name, rate in (("a", 1e-4), ("b", 3e-4)):
        logs = [{"step": step, "loss": 1.0, "learning_rate": rate / step} for step in (1, 2)]
        write_run(tmp_path / name / "out", logs=logs, state=True)
    figures, _ = report(tmp_path / "a/out", tmp_path / "b/out")
    assert legend(figures[0]) == [
        f"learning_rate (largest logged)={r} ({n}/out)" for n, r in (("a", 1e-4), ("b", 3e-4))
    ]


def test_a_killed_run_is_known_by_its_arguments(tmp_path, report):
    whole = write_run(tmp_path / "whole", learning_rate=1e-4, optim="adatamw", logging_steps=2)
    killed = write_run(tmp_path / "killed", arguments={"learning_rate": 3e-4, "optim": "adatamw"})
    figures, text = report(whole, killed)
    assert legend(figures[0]) == ["learning_rate=0.0001 (whole)", "learning_rate=0.0003 (killed)"]
    assert "killed has no results.json: its settings are only those of arguments.json." in text
    assert report.cells["logging_steps"] == ["2"]  # not known to differ


def test_long_names_are_whole(tmp_path, report):
    names = [f"{'sweep-' * 18}{letter}-{'end' * 18}" for letter in "AB"]
    figures, _ = report(*(write_run(tmp_path / name) for name in names))
    assert legend(figures[0]) == names
    assert all("\n" in text.get_text() for text in figures[0].legends[0].get_texts())


def test_folders_that_all_long_paths_have_are_left_out(tmp_path, report):
    middle = "the/same/folders/in/all/of/the/runs/of/this/sweep"
    figures, _ = report(*(write_run(tmp_path / name / middle / "out") for name in "ab"))
    assert legend(figures[0]) == ["a/…/out", "b/…/out"]


def test_repeats_that_nothing_tells_apart_are_all_named(tmp_path, report):
    runs = [write_run(tmp_path / name / "out", optim="adatamw", seed=0) for name in "abcd"]
    assert legend(report(*runs[:2])[0][0]) == ["a/out, b/out (2 runs)"]
    assert legend(report(*runs)[0][0]) == ["a/out, b/out and 2 more (4 runs)"]


@pytest.mark.parametrize("number", [12, 40])
def test_many_runs_are_all_named_and_look_different(tmp_path, report, number):
    runs = [write_run(tmp_path / f"run-{i}", learning_rate=i / 1000, seed=0) for i in range(number)]
    figures, _ = report(*runs)
    figure = figures[0]
    assert legend(figure) == [f"learning_rate={i / 1000:.4g} (run-{i})" for i in range(number)]
    handles = figure.legends[0].legend_handles
    assert len({(h.get_color(), h.get_linestyle(), h.get_marker()) for h in handles}) == number
    lines = figure.axes[0].lines
    for line, handle in zip(lines, handles, strict=True):
        assert (line.get_color(), line.get_linestyle()) == (handle.get_color(), handle.get_linestyle())
        shown = "" if not line.get_markevery() else line.get_marker()
        assert shown == handle.get_marker().replace("None", "")
    figure.draw_without_rendering()
    box, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert box.y0 >= axes.y1
    assert box.y1 <= figure.bbox.height
    assert box.x1 <= figure.bbox.width
    assert axes.height > 0.5 * 3.2 * figure.dpi  # the curves have kept their place


def test_no_two_of_the_looks_are_one():
    for theme in THEMES:
        assert len({curve_look(number, theme) for number in range(192)}) == 192
        assert len({curve_look(number, theme)[:2] for number in range(24)}) == 24


def test_more_settings_than_three(tmp_path, report):
    """Those are named that tell the runs apart; that there are others is said."""
    runs = [
        write_run(tmp_path / f"{i}-{seed}", optim="adatamw", seed=seed, learning_rate=0.1 + i // 2, lora_r=8 + i // 2,
                  batch=1 + i // 2, decay=i // 2, z=i)
        for i in range(4) for seed in range(2)
    ]  # fmt: skip
    figures, _ = report(*runs)
    assert legend(figures[0])[:2] == [
        "learning_rate=0.1, lora_r=8, batch=1, z=0, 1 more differ (2 runs)",
        "learning_rate=0.1, lora_r=8, batch=1, z=1, 1 more differ (2 runs)",
    ]
    assert len(set(legend(figures[0]))) == 4


def test_digits_are_kept_where_they_tell_runs_apart(tmp_path, report):
    runs = [write_run(tmp_path / str(i), learning_rate=1.00001 + i / 1e6, seed=0) for i in range(2)]
    assert legend(report(*runs)[0][0]) == ["learning_rate=1.00001 (0)", "learning_rate=1.000011 (1)"]


def test_a_legend_names_only_what_is_drawn(tmp_path, report):
    without = [{"step": step, "loss": 1.0} for step in STEPS]
    runs = [write_run(tmp_path / "without", logs=without), write_run(tmp_path / "with")]
    figures, _ = report(*runs)
    norms = figures[report.titles.index("Gradient norm")]
    assert legend(figures[0]) == ["without", "with"]
    assert legend(norms) == ["with"]
    assert norms.legends[0].legend_handles[0].get_color() == norms.axes[0].lines[0].get_color()


def test_a_heatmap_says_whose_it_is_and_how_many_layers_it_names(tmp_path, report):
    def torque(count):
        return [{"step": s, "group": f"layers.{i}", "damping_mean": 0.6} for s in STEPS for i in range(count)]

    logs = [{"step": step, "loss": 1.0, "torque/damping_mean": 0.6} for step in STEPS]
    runs = [write_run(tmp_path / name / "out", logs=logs, torque=torque(count), optim=name)
            for name, count in (("few", 48), ("many", 100))]  # fmt: skip
    figures, _ = report(*runs)
    few, many = figures[-2:]
    assert (few.get_suptitle(), many.get_suptitle()) == ("optim=few (few/out)", "optim=many (many/out)")
    assert few.axes[0].get_ylabel() == ""
    assert many.axes[0].get_ylabel() == "34 of the 100 layer groups are named"
    assert len(many.axes[0].get_yticks()) == 34


def test_evaluations_that_have_no_room_are_named(tmp_path, report):
    logs = [{"step": 2, "loss": 1.0, **{f"eval_metric_{i}": 1.0 for i in range(11)}, "eval_runtime": 3.0}]
    figures, text = report(write_run(tmp_path / "run", logs=logs))
    assert len(figures[1].axes) == 9
    assert "Not drawn: metric_9, metric_10." in text


# As TRL 1.16 wrote them into trainer_state.json.
DPO = [
    {"epoch": 0, "eval_entropy": 0.596, "eval_logits/chosen": -2.10, "eval_logits/rejected": -2.10,
     "eval_logps/chosen": -18.2, "eval_logps/rejected": -17.3, "eval_loss": 3.01, "eval_mean_token_accuracy": 0.609,
     "eval_num_tokens": 0.0, "eval_rewards/accuracies": 0.0, "eval_rewards/chosen": 0.0, "eval_rewards/margins": 0.0,
     "eval_rewards/rejected": 0.0, "eval_runtime": 0.53, "eval_samples_per_second": 224.3,
     "eval_steps_per_second": 3.7, "step": 0},
    {"entropy": 0.9, "epoch": 0.26, "grad_norm": 2.7, "learning_rate": 0.0027, "logits/chosen": -2.27,
     "logits/rejected": -2.28, "logps/chosen": -8.18, "logps/rejected": -7.73, "loss": 1.816,
     "mean_token_accuracy": 0.66, "num_tokens": 3817.0, "rewards/accuracies": 0.5625, "rewards/chosen": 0.9932,
     "rewards/margins": 0.0243, "rewards/rejected": 0.9689, "step": 6},
    {"entropy": 0.42, "epoch": 1.3, "grad_norm": 0.87, "learning_rate": 0.0001, "logits/chosen": -2.11,
     "logits/rejected": -2.04, "logps/chosen": -1.45, "logps/rejected": -4.17, "loss": 0.7194,
     "mean_token_accuracy": 0.91, "num_tokens": 18887.0, "rewards/accuracies": 0.875, "rewards/chosen": 1.6342,
     "rewards/margins": 0.3671, "rewards/rejected": 1.2671, "step": 30},
    {"epoch": 1.3, "eval_entropy": 0.41, "eval_logits/chosen": -2.08, "eval_logits/rejected": -2.0,
     "eval_logps/chosen": -1.27, "eval_logps/rejected": -4.49, "eval_loss": 0.69, "eval_mean_token_accuracy": 0.93,
     "eval_num_tokens": 18887.0, "eval_rewards/accuracies": 0.8917, "eval_rewards/chosen": 1.6988,
     "eval_rewards/margins": 0.4112, "eval_rewards/rejected": 1.2876, "eval_runtime": 0.54,
     "eval_samples_per_second": 222.3, "eval_steps_per_second": 3.7, "step": 30},
]  # fmt: skip
REWARDS = ["margins", "accuracies", "chosen", "rejected"]


@pytest.mark.parametrize("finished", [False, True])
def test_rewards_of_preferences_are_drawn_and_told(tmp_path, report, finished):
    """Of a Trainer of TRL, and of the recipe, whose results.json has no rewards of the training."""
    folder = write_run(tmp_path / "out", logs=DPO, state=not finished)
    figures, text = report(folder)
    axes = figures[report.titles.index("Rewards")].axes
    assert [axis.get_ylabel() for axis in axes[:4]] == [
        "margin (chosen - rejected),\ntraining",
        "margin (chosen - rejected),\nevaluation",
        "accuracy (pairs with margin > 0),\ntraining",
        "accuracy (pairs with margin > 0),\nevaluation",
    ]
    assert {axis.get_xlabel() for axis in axes} == {"optimizer step"}
    for row, name in enumerate(REWARDS):
        trained, evaluated = axes[2 * row : 2 * row + 2]
        assert curve(trained) == ([6, 30], [DPO[1][f"rewards/{name}"], DPO[2][f"rewards/{name}"]])
        assert curve(evaluated) == ([0, 30], [DPO[0][f"eval_rewards/{name}"], DPO[3][f"eval_rewards/{name}"]])
        assert trained.get_ylim() == evaluated.get_ylim()
        assert trained.get_yscale() == "linear"
    assert report.cells["eval rewards/margins"] == ["0.4112"]
    assert report.cells["eval rewards/accuracies"] == ["0.8917"]
    assert report.cells["eval rewards/chosen"] == ["1.699"]
    assert report.cells["rewards/margins (last logged in training)"] == ["0.3671"]
    assert report.cells["rewards/accuracies (last logged in training)"] == ["0.875"]
    evaluation = figures[report.titles.index("Evaluation")]
    assert not [axis for axis in evaluation.axes if "rewards" in axis.get_ylabel()]
    assert "Columns: training, evaluation;" in text


def test_rewards_of_several_evaluations_and_without_accuracies(tmp_path, report):
    """Datasets by name, as the Trainer prefixes them, and KTO, which logs no accuracies."""
    logs = [{"step": 4, "loss": 1.0, "rewards/margins": 1.0},
            {"step": 4, "eval_easy_rewards/margins": 2.0}, {"step": 4, "eval_hard_rewards/chosen": 3.0}]  # fmt: skip
    figures, _ = report(write_run(tmp_path / "run", logs=logs))
    axes = figures[report.titles.index("Rewards")].axes
    assert [axis.get_ylabel().rpartition("\n")[2] for axis in axes] == [
        "training",
        "evaluation easy",
        "evaluation hard",
    ] * 2
    assert curve(axes[1]) == ([4], [2.0])
    assert curve(axes[5]) == ([4], [3.0])
    assert [text.get_text() for text in axes[2].texts] == ["not logged"]


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (NAN, "NaN", "NaN"),
        (None, "NaN", "NaN"),
        ("NaN", "NaN", "NaN"),
        ("nan", "NaN", "NaN"),
        (math.inf, "+inf", "infinite"),
        ("Infinity", "+inf", "infinite"),
        ("-inf", "-inf", "infinite"),
    ],
)
@pytest.mark.parametrize("key", ["loss", "eval_loss", "grad_norm", "torque/damping_mean", "rewards/margins"])
def test_what_is_not_finite_is_marked_and_said(tmp_path, report, value, kind, words, key):
    logs = [{"step": step, "loss": 2.0} | {key: value if step in (4, 8) else 2.0} for step in STEPS]
    figures, text = report(write_run(tmp_path / "out", logs=logs))
    figure = figures[0 if key == "loss" else 1]
    assert marks(figure.axes[0]) == {kind: [4, 8]}
    steps, values = curve(figure.axes[0])
    assert steps == STEPS
    assert np.isnan(values).tolist() == [False, True, False, True]  # no line goes on to the next
    line = next(line for line in figure.axes[0].lines if list(line.get_xdata()) == STEPS)
    assert key == "eval_loss" or line.get_markevery() == [0, 2]  # and what stands alone is a dot
    assert legend(figure) == ["out", f"{kind}, at its step"]
    assert f"out: {key} is {words} at steps 4 and 8." in text


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ([6, 8], "loss is NaN from step 6 on."),
        ([8], "loss is NaN at step 8."),
        ([4], "loss is NaN at step 4."),
        (STEPS, "loss is NaN at every step that it was logged at, from 2 on."),
    ],
)
def test_where_it_is_nan(tmp_path, report, odd, words):
    logs = [{"step": step, "loss": NAN if step in odd else 1.0} for step in STEPS]
    assert f"out: {words}" in report(write_run(tmp_path / "out", logs=logs))[1]


def test_many_single_steps_are_counted(tmp_path, report):
    logs = [{"step": step, "loss": NAN if step % 2 else 1.0} for step in range(1, 21)]
    assert (
        "loss is NaN at 10 of 20 logged steps, first at 1 and last at 19."
        in report(write_run(tmp_path / "out", logs=logs))[1]
    )


def test_a_run_that_is_all_nan(tmp_path, report):
    keys = ["loss", "grad_norm", "eval_loss", "torque/damping_mean", "rewards/margins", "rewards/accuracies"]
    torque = [{"step": step, "group": "layers.0", "damping_mean": NAN} for step in STEPS]
    folder = write_run(tmp_path / "out", logs=[{"step": s, **dict.fromkeys(keys, NAN)} for s in STEPS], torque=torque)
    (folder / "results.json").write_text('{"train_loss": NaN, "eval_loss": null, "settings": {}}')
    figures, text = report(folder)
    assert len(figures) == 6
    for figure in figures[:5]:
        for axis in figure.axes:
            assert marks(axis) == {"NaN": STEPS}
            assert [text.get_text() for text in axis.texts] == ["no finite value"]
            low, high = axis.get_xlim()
            assert low < 2 < 8 < high
    assert f"out: {', '.join(keys[:-1])} and {keys[-1]} are NaN at every step" in text
    assert report.cells["train loss"] == ["NaN"]
    assert report.cells["eval loss"] == ["null"]
    assert report.cells["rewards/margins (last logged in training)"] == ["NaN"]


def test_cells_of_a_heatmap_that_are_nan(tmp_path, report):
    """What was not logged is empty; what is NaN has a mark; and the colours are of the rest."""
    torque = [{"step": s, "group": f"layers.{i}", "damping_mean": NAN if (s, i) == (4, 1) else 0.75}
              for s in STEPS for i in range(2) if (s, i) != (8, 0)]  # fmt: skip
    logs = [{"step": step, "loss": 1.0, "torque/damping_mean": 0.6} for step in STEPS]
    figures, text = report(write_run(tmp_path / "out", logs=logs, torque=torque))
    (mark,) = figures[-1].axes[0].lines
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([3.0], [1.5])
    assert figures[-1].axes[0].collections[0].get_clim() == (0.25, 0.75)
    assert "out: the damping of layers.1 is NaN at step 4." in text
    assert "×: NaN or infinite." in text  # noqa: RUF001


def test_one_of_several_seeds_diverges(tmp_path, report):
    for seed in range(3):
        logs = [{"step": step, "loss": NAN if seed == 1 and step > 4 else 1.0 + seed} for step in STEPS]
        write_run(tmp_path / f"seed-{seed}", logs=logs, seed=seed)
    figures, text = report(*sorted(tmp_path.glob("seed-*")))
    (axis,) = figures[0].axes
    assert marks(axis) == {"NaN": [6, 8]}
    np.testing.assert_equal(curve(axis)[1], [2.0, 2.0, NAN, NAN])
    box = axis.collections[0].get_paths()[0].get_extents()  # of the seeds that have not
    assert (box.x0, box.x1, box.y0, box.y1) == (2, 8, 1.0, 3.0)
    assert "seed-1: loss is NaN from step 6 on." in text


def test_seeds_that_share_no_step(tmp_path, report):
    """There is no curve of them, and the page says so."""
    for seed in range(2):
        logs = [{"step": step + seed, "loss": 1.0} for step in STEPS] + [{"step": 9, "eval_loss": 1.0}]
        write_run(tmp_path / f"seed-{seed}", logs=logs, seed=seed)
    _, text = report(*sorted(tmp_path.glob("seed-*")))
    assert report.titles[0] == "Evaluation"
    assert "seed-0, seed-1 (2 runs): loss cannot be drawn, since its runs logged it at no step" in text


@pytest.mark.long
@pytest.mark.parametrize(("filters", "first"), [(True, 6), (False, 4)])
def test_the_log_of_a_trainer_whose_loss_becomes_nan(tmp_path, report, filters, first):
    """It logs 0 in the place of NaN unless told otherwise, which would be the best of all losses."""
    torch = pytest.importorskip("torch")
    from transformers import Trainer, TrainingArguments

    class Diverging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = torch.nn.Linear(1, 1), 0

        def forward(self, x, labels=None):
            self.calls += 1
            return {"loss": self.layer(x).square().mean() * (NAN if self.calls >= 4 else 1.0)}

    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=8, logging_steps=2, save_steps=8, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_nan_inf_filter=filters,
    )  # fmt: skip
    Trainer(Diverging(), arguments, train_dataset=[{"x": torch.ones(1), "labels": 0}] * 64).train()
    figures, text = report(tmp_path / "out")
    assert marks(figures[0].axes[0]) == {"NaN": [step for step in STEPS if step >= first]}
    assert marks(figures[1].axes[0]) == {"NaN": [4, 6, 8]}
    assert ("logged a loss of 0 with a grad_norm that is not finite, first at step 6" in text) == filters
