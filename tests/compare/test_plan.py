"""What a comparison's YAML may say, and that it can neither choose on test data nor treat optimizers differently."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("scipy")

import importlib

from hf_tam.lab.compare.plan import PlanError, load_plan

COMPARISONS = sorted(Path(__file__).parents[2].glob("recipes/comparisons/*.yaml"))
PLAN = {
    "recipe": "classify",
    "arguments": {"text_metrics": ["bleu", "chrf"], "warmup_steps": 0.1},
    "optimizers": {"AdamW": {"optim": "adamw_torch"}, "model": {"optim": "adatamw", "optim_args": "scope=model"}},
    "learning_rates": ["1e-3", 2e-3],
    "seeds": [0, 1, 2],
}


def write(tmp_path, **changes):
    path = tmp_path / "plan.yaml"
    path.write_text(
        yaml.safe_dump(
            {name: value for name, value in {**PLAN, **changes}.items() if value is not None}, sort_keys=False
        )
    )
    return path


def test_every_optimizer_gets_the_same_runs(tmp_path):
    plan = load_plan(write(tmp_path, search_seeds=2))
    specs = plan.search(plan.learning_rates)
    assert len(specs) == 2 * 2 * 2
    ours, theirs = ([spec for spec in specs if spec.label == label] for label in plan.optimizers)
    assert [(spec.learning_rate, spec.seed) for spec in ours] == [(spec.learning_rate, spec.seed) for spec in theirs]
    assert {spec.seed for spec in specs} == {0, 1}
    different = {"optim", "optim_args"}
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.arguments.items() if k not in different} == {
            k: v for k, v in other.arguments.items() if k not in different
        }
    assert len({spec.key for spec in specs}) == len(specs)


def test_arguments_become_flags(tmp_path):
    plan = load_plan(write(tmp_path))
    plan.arguments["test_file"] = None
    words = plan.spec("model", 1e-3, 2).command_line()
    expected = "--text_metrics bleu chrf --warmup_steps 0.1 --optim adatamw --optim_args scope=model"
    assert words == [*expected.split(), "--learning_rate", "0.001", "--seed", "2"]


def test_a_key_is_of_the_arguments_alone(tmp_path):
    plan = load_plan(write(tmp_path))
    renamed = load_plan(write(tmp_path, optimizers={"other": {"optim": "adamw_torch"}}))
    assert plan.spec("AdamW", 1e-3, 0).key == renamed.spec("other", 1e-3, 0).key
    assert plan.spec("AdamW", 1e-3, 0).key != plan.spec("AdamW", 1e-3, 1).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_metric": "test_accuracy"}, "'test_accuracy' is of the test data, on which no learning rate"),
        ({"validation_metric": "test_loss"}, "'test_loss' is of the test data"),
        ({"validation_metric": "a", "test_metric": "a"}, "'a' is of the test data"),
        ({"arguments": {"test_file": "x", "validation_file": "x"}}, "validation_file is the test_file"),
        ({"learning_rate": [1e-3]}, "unknown key 'learning_rate'; the keys are "),
        ({"recipe": None}, "recipe is missing or empty"),
        ({"seeds": []}, "seeds is missing or empty"),
        ({"seeds": [0, 0]}, r"seeds must be different whole numbers, not \[0, 0\]"),
        ({"seeds": [0.5]}, r"seeds must be different whole numbers, not \[0.5\]"),
        ({"search_seeds": 4}, r"search_seeds must be from 1 to the number of seeds \(3\)"),
        ({"learning_rates": [2e-3, 1e-3]}, "learning_rates must be positive and rise"),
        ({"learning_rates": [0.0, 1e-3]}, "learning_rates must be positive and rise"),
        ({"learning_rates": ["fast"]}, "learning_rates must be numbers, not 'fast'"),
        ({"tolerance": "nan"}, "tolerance must be numbers, not 'nan'"),
        ({"optimizers": {"AdamW": None}}, "optimizer 'AdamW' does not say its `optim`"),
        (
            {"optimizers": {"AdamW": "adamw_torch"}},
            r"'AdamW' must be a mapping such as \{optim: adatamw\}",
        ),
        ({"optimizers": ["adamw_torch"]}, r"optimizers must be a mapping, not \['adamw_torch'\]"),
        ({"optimizers": {"a": {"optim": "x"}, "b": {"optim": "x"}}}, "optimizers 'a' and 'b' are the same runs"),
        ({"optimizers": {"a": {"optim": "x", "learning_rates": [1]}}}, "learning_rates is set for each run: take it"),
        ({"arguments": {"seed": 1}}, "seed is set for each run: take it out of the arguments"),
        ({"arguments": [1]}, r"arguments must be a mapping, not \[1\]"),
        ({"learning_rates": 1e-3}, "learning_rates must be a list, not 0.001"),
        ({"seeds": 5}, "seeds must be a list, not 5"),
        ({"also_shown": "test_loss"}, "also_shown must be a list, not 'test_loss'"),
        ({"validation_metric": 3}, "validation_metric must be a word, not 3"),
        ({"max_extensions": -1}, "max_extensions must be a whole number of at least 0, not -1"),
        ({"max_extensions": "many"}, "max_extensions must be a whole number of at least 0, not 'many'"),
        ({"validation_metric": "eval_loss"}, "say greater_is_better, true or false, for 'eval_loss', not None"),
        ({"greater_is_better": "no"}, "say greater_is_better, true or false, for 'eval_accuracy', not 'no'"),
        ({"arguments": {"test_file": "./x", "validation_file": "x"}}, "validation_file is the test_file"),
        (
            {
                "arguments": {"test_file": "x"},
                "optimizers": {"a": {"optim": "x"}, "b": {"optim": "x", "validation_file": "x"}},
            },
            "validation_file is the test_file",
        ),
    ],
)
def test_bad_plans_are_one_sentence(changes, message, tmp_path):
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(write(tmp_path, **changes))
    assert "plan.yaml" in str(caught.value)


@pytest.mark.parametrize("content", ["a: [", "- 1", ""])
def test_what_is_no_plan(content, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"plan\.yaml"):
        load_plan(path)
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_plans_that_are_there_are_understood_by_their_recipes(path, tmp_path):
    from recipes.support.config import parse_recipe_arguments

    plan = load_plan(path)
    recipe = importlib.import_module(f"recipes.{plan.recipe}")
    for label in plan.optimizers:
        words = plan.spec(label, plan.learning_rates[0], plan.seeds[0]).command_line()
        *_, arguments = parse_recipe_arguments(
            recipe.make_parser(), [*words, f"--output_dir={tmp_path}"], demo_config=recipe.DEMO_CONFIG
        )
        assert arguments.seed == plan.seeds[0]
        assert (
            str(arguments.optim.value if hasattr(arguments.optim, "value") else arguments.optim)
            == (plan.optimizers[label]["optim"])
        )
    assert plan.search_seeds >= 2
    assert len(plan.seeds) >= 5
