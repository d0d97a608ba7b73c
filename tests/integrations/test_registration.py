"""What registration does when transformers is not as expected, on stand-ins for its modules."""

import enum
import logging
import types

import pytest

from hf_tam.integrations.transformers import patches as integration


class Names(str, enum.Enum):
    SGD = "sgd"


class NamesWithTam(str, enum.Enum):
    SGD = "sgd"
    TAM = "tam"


@pytest.fixture(autouse=True)
def _fresh_registration(monkeypatch):
    monkeypatch.setattr(integration, "registered_names", [])
    monkeypatch.setattr(integration, "patched", [])


def training_args_module(names):
    class TrainingArguments:
        optim_args = None

        def __init__(self, optim):
            self.optim = optim
            self.__post_init__()

        def __post_init__(self):
            self.optim = names(self.optim)

        def set_optimizer(self, name):
            self.optim = names(name)
            return self

    module = types.ModuleType("transformers.training_args")
    module.OptimizerNames, module.TrainingArguments = names, TrainingArguments
    return module


def handlers_module(**handlers):
    module = types.ModuleType("transformers.trainer_optimizer")
    module._OPTIMIZER_HANDLERS = handlers
    return module


def test_a_name_that_transformers_ships_is_left_to_it(caplog):
    module = training_args_module(NamesWithTam)
    with caplog.at_level(logging.WARNING, "hf_tam"):
        integration.register(module)
    assert integration.registered_names == ["adatamw", "adatam"]
    assert [record.getMessage().split(":")[0].split(" is ")[0] for record in caplog.records] == ["--optim tam"]
    assert module.TrainingArguments("tam").optim is NamesWithTam.TAM


def test_a_handler_of_another_plugin_is_left_alone(caplog):
    integration.register(training_args_module(enum.Enum("Names", {"SGD": "sgd"}, type=str)))
    other = object()
    module = handlers_module(adatam=other)
    with caplog.at_level(logging.WARNING, "hf_tam"):
        integration.register(module)
    assert module._OPTIMIZER_HANDLERS["adatam"] is other
    assert integration.registered_names == ["adatamw", "tam"]
    assert "--optim adatam is already known" in caplog.text
    assert set(module._OPTIMIZER_HANDLERS) == {"adatamw", "adatam", "tam"}


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        (types.ModuleType("transformers.training_args"), "transformers.training_args.OptimizerNames"),
        (types.ModuleType("transformers.trainer_optimizer"), "transformers.trainer_optimizer._OPTIMIZER_HANDLERS"),
    ],
)
def test_a_missing_private_name_is_one_error_with_the_tested_range(module, missing):
    with pytest.raises(ImportError, match="cannot register") as caught:
        integration.register(module)
    assert missing in str(caught.value)
    assert integration.ACCEPTED_RANGE in str(caught.value)
    assert "HF_TAM_AUTOLOAD=0" in str(caught.value)


def test_a_missing_method_of_the_trainer_changes_nothing():
    class Trainer:
        def train(self): ...

    module = types.ModuleType("transformers.trainer")
    module.Trainer, train = Trainer, Trainer.train
    with pytest.raises(ImportError, match=r"no Trainer\.create_optimizer"):
        integration.register(module)
    assert Trainer.train is train


def test_a_transformers_without_its_optimizer_module_is_refused_before_a_name_is_added(monkeypatch):
    monkeypatch.setattr(integration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"no transformers\.trainer_optimizer"):
        integration.register(training_args_module(Names))
    assert [name.value for name in Names] == ["sgd"]


class TestAnnouncement:
    def test_the_first_rank_logs_it(self, monkeypatch, caplog):
        monkeypatch.delenv("HF_TAM_ANNOUNCE", raising=False)
        monkeypatch.setattr(integration, "registered_names", ["tam"])
        with caplog.at_level(logging.INFO, "hf_tam"):
            for rank in ("1", "0"):
                monkeypatch.setenv("RANK", rank)
                integration._announce()
        assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["--optim tam (TAM)"]

    def test_a_launcher_makes_it_seen_once(self, monkeypatch, capsys):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv("HF_TAM_ANNOUNCE", "1")
        integration._announce()
        integration._announce()
        assert capsys.readouterr().err.count("registered with transformers") == 1
