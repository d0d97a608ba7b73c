"""Flows through the Trainer, accelerate and DeepSpeed that others have reported as going wrong, tried with ours."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

import hf_tam
from tests.field.deepspeed_alone import deepspeed_alone
from tests.field.test_deepspeed_stock_files import ALL_AUTO, Rates, stock
from tests.field.test_deepspeed_universal import start
from tests.field.test_deepspeed_universal import train as take_steps
from tests.integrations.test_trainer import make_trainer, training_arguments
from tests.integrations.untouched import TokenRows
from tests.sharding import framework_runs as runs
from tests.sharding.zero_engine import configuration

pytest.importorskip("deepspeed")
# The engine's runs move lr by hand, without a scheduler that would note where it began.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint's hyperparameters override the requested ones. lr=")
ALONE = runs.Way(1, "flat", stage=1)


@pytest.fixture
def deepspeed():
    with deepspeed_alone() as module:
        yield module


@pytest.fixture
def strategy(deepspeed):
    with runs.strategy(ALONE):
        yield


def options(config, **changes):
    return {"deepspeed": config, "use_cpu": False, "bf16": False, "max_steps": 3, "learning_rate": 2e-3, **changes}


@pytest.mark.usefixtures("strategy")
class TestTrainer:
    @pytest.mark.long
    def test_every_trial_of_a_search_trains_with_ours(self, tmp_path):
        """transformers reads the file anew for each, with its "optimizer" block."""
        pytest.importorskip("optuna")
        seen = []

        class Noting(Rates):
            def on_train_end(self, args, state, control, optimizer=None, **kwargs):
                inner = runs.unwrapped_twice(optimizer)
                seen.append((type(inner), inner.defaults["lr"], inner.logical.is_partitioned(inner.param_groups)))

        trainer = Trainer(
            args=training_arguments(tmp_path, **options(stock(1, params=ALL_AUTO), eval_strategy="no")),
            train_dataset=TokenRows(32), eval_dataset=TokenRows(8), callbacks=[Noting()],
            model_init=lambda trial=None: runs.model_of(False),
        )  # fmt: skip
        rates = iter((1e-3, 5e-3))
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [next(rates)])},
            compute_objective=lambda metrics: 0.0, n_trials=1, backend="optuna",
        )  # fmt: skip
        assert seen == [(hf_tam.AdaTAMW, 1e-3, True)]

    def test_a_block_without_a_scheduler(self, tmp_path):
        """The schedule is the Trainer's own then."""
        rates = Rates()
        trainer = make_trainer(
            tmp_path, model=runs.model_of(False), callbacks=[rates], **options(stock(2, params=ALL_AUTO))
        )
        trainer.train()
        assert type(runs.unwrapped_twice(trainer.optimizer)) is hf_tam.AdaTAMW
        assert [max(step) for step in rates.rates] == pytest.approx([2e-3 * 2 / 3, 2e-3 / 3, 0.0])

    @pytest.mark.long
    @pytest.mark.parametrize("stage", [1, 3])
    def test_learning_rates_of_groups_stay_their_own_and_are_resumed(self, tmp_path, stage):
        class Layerwise(Trainer):
            def create_optimizer(self, model=None):
                kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
                groups = [
                    {"params": [parameter], "lr": 1e-3 / (1 + number)}
                    for number, parameter in enumerate(self.model.parameters())
                ]
                self.optimizer = kind(groups, **kwargs)
                return self.optimizer

        config = runs.deepspeed_config(runs.Way(1, "flat", stage=stage))
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}

        def run(resume=None):
            trainer = make_trainer(
                tmp_path, trainer=Layerwise, model=runs.model_of(False), **options(config, **saving)
            )
            trainer.train(resume_from_checkpoint=resume)
            optimizer = runs.unwrapped_twice(trainer.optimizer)
            return [group["lr"] for group in optimizer.param_groups], runs.whole_parameters(trainer.model)

        rates, parameters = run()
        assert rates == [1e-3 / (1 + number) for number in range(len(rates))]
        resumed_rates, resumed = run(str(tmp_path / "checkpoint-2"))
        assert resumed_rates == rates
        assert all(torch.equal(value, parameters[name]) for name, value in resumed.items())

    def test_a_checkpoint_of_the_model_alone(self, tmp_path):
        config = runs.deepspeed_config(ALONE)
        saving = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
        make_trainer(tmp_path, model=runs.model_of(False), **options(config, **saving)).train()
        trainer = make_trainer(tmp_path, model=runs.model_of(False), **options(config, save_strategy="no"))
        with pytest.raises(ValueError, match=r"checkpoint-3 has no optimizer shards of DeepSpeed's"):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.long
    def test_a_batch_that_was_too_large(self, tmp_path):
        """auto_find_batch_size makes the engine, and the optimizer in it, a second time."""

        class Failing(Trainer):
            attempts = 0

            def training_step(self, *args, **kwargs):
                Failing.attempts += 1
                if Failing.attempts == 2:
                    raise RuntimeError("CUDA out of memory.")
                return super().training_step(*args, **kwargs)

        config = options(stock(2, params=ALL_AUTO), auto_find_batch_size=True)
        trainer = make_trainer(tmp_path, trainer=Failing, model=runs.model_of(False), **config)
        trainer.train()
        assert type(runs.unwrapped_twice(trainer.optimizer)) is hf_tam.AdaTAMW
        assert trainer.state.global_step == 3

    def test_the_best_model_is_loaded_in_the_end(self, tmp_path):
        """By the engine, with all that its checkpoint holds."""
        config = runs.deepspeed_config(runs.Way(1, "flat", stage=2))
        saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = make_trainer(tmp_path, model=runs.model_of(False), **options(config, **saving, **best))
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")  # the loss falls
        table = runs.unwrapped_twice(trainer.optimizer).param_groups[0]["logical_tensors"]
        assert set(table["step"].tolist()) == {1.0}


@pytest.mark.usefixtures("strategy")
def test_a_teacher_under_another_plugin():
    """Two configurations in one Accelerator: that of the model which is prepared is the one that counts."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "train_batch_size": 4}
    student = stock(2, params=ALL_AUTO) | sizes | {"gradient_clipping": 1.0}
    teacher = {"zero_optimization": {"stage": 3}, **sizes}
    plugins = {name: DeepSpeedPlugin(hf_ds_config=config) for name, config in {"s": student, "t": teacher}.items()}
    accelerator = Accelerator(deepspeed_plugins=plugins)
    model = runs.model_of(False)
    model, optimizer = accelerator.prepare(model, hf_tam.AdaTAMW(model.parameters(), lr=1e-3))
    assert "optimizer" not in plugins["s"].deepspeed_config
    accelerator.state.select_deepspeed_plugin("t")
    accelerator.prepare(runs.model_of(False))
    accelerator.state.select_deepspeed_plugin("s")
    rows = TokenRows(4).rows
    for _ in range(3):
        model.backward(model(input_ids=rows, labels=rows).loss)
        model.step()
    assert runs.unwrapped_twice(optimizer).torque_stats()["torque"].abs().max() > 0


def test_a_reference_model_beside_the_trained_one(deepspeed):
    """As TRL makes one: initialised with the file of the trained model, and no optimizer."""
    module = nn.Linear(5, 3)
    config = configuration(2)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=hf_tam.TAM(module.parameters(), lr=0.1), config=copy.deepcopy(config)
    )
    reference, *_ = deepspeed.initialize(model=nn.Linear(5, 3), config=config | {"zero_optimization": {"stage": 0}})
    assert reference.optimizer is None
    assert type(engine.optimizer.optimizer) is hf_tam.TAM


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_scheduler_of_the_users_own_goes_on_after_a_load(deepspeed, tmp_path, stage):
    """It must move the groups that the optimizer steps with, and not those from before the load."""

    def engine():
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        optimizer = hf_tam.AdaTAMW(module.parameters(), lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        config = configuration(stage) | {"gradient_accumulation_steps": 1}
        made, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=config)
        return made, optimizer

    def steps(made, count):
        for _ in range(count):
            made.backward(made(torch.ones(2, 5)).square().mean())
            made.step()
        return made

    whole, optimizer = engine()
    steps(whole, 2).save_checkpoint(tmp_path, tag="step")
    steps(whole, 2)
    resumed, loaded = engine()
    resumed.load_checkpoint(tmp_path, tag="step")
    assert loaded.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    steps(resumed, 2)
    assert loaded.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 5)
    assert torch.equal(loaded.torque_stats()["effective_lr"], optimizer.torque_stats()["effective_lr"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_weights_are_recovered_from_the_shards(deepspeed, tmp_path, stage):
    """By the script that DeepSpeed puts beside every checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    trained = start(stage)
    take_steps(trained, range(3))
    trained.engine.save_checkpoint(tmp_path, tag="step")
    recovered = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    for name, value in trained.whole_parameters().items():
        assert torch.equal(recovered[name].reshape(-1), value.reshape(-1)), name
