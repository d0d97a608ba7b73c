"""`optim_args`: what is read, and that each kind of mistake gives one error that names it."""

import pytest

from hf_tam.integrations.transformers.optim_args import KEYS, format_optim_args, parse_optim_args


def test_values_have_their_types():
    text = "gamma=0.95,scope=model, torque_steps=100,foreach=false,fused=none,maximize=TRUE,beta1=.8,nonfinite=raise,"
    assert parse_optim_args("adatamw", text) == {
        "gamma": 0.95,
        "scope": "model",
        "torque_steps": 100,
        "foreach": False,
        "fused": None,
        "maximize": True,
        "beta1": 0.8,
        "nonfinite": "raise",
    }


@pytest.mark.parametrize("text", [None, "", " ", ",", " , "])
def test_nothing_is_nothing(text):
    assert parse_optim_args("tam", text) == {}


@pytest.mark.parametrize("optim", KEYS)
def test_what_is_written_is_read_back(optim):
    values = {"gamma": 1e-05, "torque_steps": None, "foreach": True, "scope": "model"}
    text = format_optim_args(values)
    assert " " not in text
    assert parse_optim_args(optim, text) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gama=0.9", ["'gama'", "adatamw", "'gamma'", "damping_eps, scope, step_size", "capturable"]),
        ("momentum=0.9", ["'momentum'", "unknown to --optim adatamw"]),
        ("betas=(0.9,0.99)", ["'betas'", "beta1=... and beta2=..."]),
        ("lr=1", ["'lr'", "--learning_rate"]),
        ("weight_decay=1", ["'weight_decay'", "--weight_decay"]),
        ("gamma", ["'gamma'", "gamma=VALUE", "a number"]),
        ("gamma=", ["'gamma='", "gamma=VALUE", "a number"]),
        ("=1", ["''", "gamma, damping_eps"]),
        ("gamma=high", ["gamma=high", "a number", "'high'"]),
        ("gamma=0.9=1", ["gamma=0.9=1", "a number"]),
        ("torque_steps=1.5", ["torque_steps=1.5", "a whole number or none"]),
        ("foreach=maybe", ["foreach=maybe", "true, false or none"]),
        ("maximize=none", ["maximize=none", "true or false"]),
        ("gamma=0.9,gamma=0.8", ["'gamma'", "twice", "0.9", "0.8"]),
    ],
)
def test_mistakes_are_named(text, words):
    with pytest.raises(ValueError, match="optim_args") as caught:
        parse_optim_args("adatamw", text)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_mapping_is_refused_with_an_example():
    with pytest.raises(TypeError, match=r"'gamma=0.95,scope=model', got \{'gamma': 0.9\} of type dict"):
        parse_optim_args("adatamw", {"gamma": 0.9})


def test_tam_has_momentum_and_no_betas():
    assert parse_optim_args("tam", "momentum=0.8") == {"momentum": 0.8}
    with pytest.raises(ValueError, match="'beta1', unknown to --optim tam"):
        parse_optim_args("tam", "beta1=0.8")
