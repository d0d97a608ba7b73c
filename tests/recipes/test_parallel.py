"""What is refused under tensor parallelism, and counting models that no process holds whole."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from recipes.support import causal_run, models, parallel
from recipes.support.arguments import LmModelArguments
from recipes.support.errors import RecipeError

CONFIG = LlamaConfig()
COLUMN_WISE = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.fixture(autouse=True)
def new_transformers(monkeypatch):
    monkeypatch.setattr(parallel, "version", lambda name: "5.23.0")


@pytest.fixture
def processes(monkeypatch):
    """Say how many processes run, and what the accelerate configuration says."""

    def pretend(count, configured=1):
        monkeypatch.setattr(parallel, "PartialState", lambda: SimpleNamespace(num_processes=count))
        monkeypatch.setattr(parallel, "ParallelismConfig", lambda: SimpleNamespace(tp_size=configured))

    return pretend


@pytest.mark.parametrize(
    ("flag", "configured", "count", "expected"),
    [(None, 1, 1, 1), (None, 1, 4, 1), (None, 4, 4, 4), (4, 1, 4, 4), (4, 4, 4, 4), (1, 1, 4, 1)],
)
def test_size(flag, configured, count, expected, processes):
    processes(count, configured)
    assert parallel.tensor_parallel_size(LmModelArguments(tp_size=flag)) == expected


@pytest.mark.parametrize(
    ("flag", "configured", "count", "message"),
    [
        (2, 4, 4, "tp_size is 2 and the accelerate configuration says 4: drop one of them"),
        (2, 1, 4, "tp_size is 2, but 4 processes run"),
        (None, 2, 1, r"tp_size is 2, but 1 processes run.*--num_processes 2"),
    ],
)
def test_size_that_cannot_be(flag, configured, count, message, processes):
    processes(count, configured)
    with pytest.raises(RecipeError, match=message):
        parallel.tensor_parallel_size(LmModelArguments(tp_size=flag))


@pytest.mark.parametrize("targets", [COLUMN_WISE, ["self_attn.q_proj"], ["lm_head"]])
def test_column_wise_targets_are_accepted(targets):
    parallel.require_tensor_parallel(
        CONFIG, LmModelArguments(use_peft=True, lora_target_modules=targets), saves_state=False
    )


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "o_proj"], ["mlp.down_proj"]])
def test_row_wise_targets_are_refused_with_those_that_work(targets):
    with pytest.raises(RecipeError, match=f"no adapter on .*{' '.join(COLUMN_WISE)}"):
        parallel.require_tensor_parallel(
            CONFIG, LmModelArguments(use_peft=True, lora_target_modules=targets), saves_state=False
        )


def test_full_fine_tuning_has_no_targets():
    parallel.require_tensor_parallel(CONFIG, LmModelArguments(), saves_state=False)


def test_checkpoints_are_refused():
    with pytest.raises(RecipeError, match="--save_strategy no"):
        parallel.require_tensor_parallel(CONFIG, LmModelArguments(), saves_state=True)


def test_model_without_a_plan_is_refused():
    config = SimpleNamespace(base_model_tp_plan=None, model_type="gpt2")
    with pytest.raises(RecipeError, match=r"no tensor-parallel plan for a gpt2 model.*fsdp2\.yaml"):
        parallel.require_tensor_parallel(config, LmModelArguments(), saves_state=False)


def test_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "version", lambda name: "5.2.0")
    with pytest.raises(RecipeError, match=r"needs transformers 5\.17\.0 or later, this is 5\.2\.0"):
        parallel.require_tensor_parallel(CONFIG, LmModelArguments(), saves_state=False)


def test_parameters_that_zero_3_took_away_are_counted():
    model = torch.nn.Linear(4, 3)
    model.weight.requires_grad = False
    for parameter in model.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert models.count_parameters(model) == (3, 15)


@pytest.mark.parametrize(("is_first", "keep", "is_there", "builds"), [
    (True, False, False, True), (True, False, True, True), (True, True, True, False), (True, True, False, True),
    (False, False, False, False),
])  # fmt: skip
def test_demo_model_is_built_by_one_process(is_first, keep, is_there, builds, tmp_path, monkeypatch):
    built = []
    state = SimpleNamespace(is_local_main_process=is_first, local_main_process_first=nullcontext)
    monkeypatch.setattr(causal_run, "PartialState", lambda: state)
    monkeypatch.setattr(causal_run.causal_demo, "build_base", lambda folder, **options: built.append(folder))
    if is_there:
        (tmp_path / "base").mkdir()
    arguments = SimpleNamespace(
        output_dir=tmp_path, resume_from_checkpoint="true" if keep else None, disable_tqdm=True
    )
    assert causal_run.prepare_demo_model(arguments) == str(tmp_path / "base")
    assert built == [tmp_path / "base"] * builds
