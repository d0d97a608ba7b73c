"""TrainingArguments with our names, however they are written, and what is left of them in files."""

import copy
import dataclasses
import json
import pickle
import sys

import pytest
import torch
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_tam  # noqa: F401  (what a user writes)
from tests.integrations.launching import run_successfully

NAMES = ["adatamw", "adatam", "tam"]


def arguments(tmp_path, optim="adatamw", **changes):
    return TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize("optim", NAMES)
def test_a_name_is_accepted_and_stays_a_plain_string(tmp_path, optim):
    args = arguments(tmp_path, optim)
    assert type(args.optim) is str
    assert args.optim == optim == OptimizerNames(optim)
    assert OptimizerNames(optim) in OptimizerNames
    assert args.optim not in [OptimizerNames.LOMO, OptimizerNames.ADALOMO]
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == optim
    assert f"optim={optim}," in str(args)
    for twin in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args, seed=1)):
        assert type(twin.optim) is str
        assert twin.optim == optim


def test_members_of_the_enum_are_ordinary_and_pickle_as_strings():
    member = OptimizerNames("tam")
    assert member is OptimizerNames.TAM is OptimizerNames["TAM"]
    assert isinstance(member, OptimizerNames)
    assert (member.name, member.value) == ("TAM", "tam")
    assert copy.deepcopy(member) == "tam"
    assert type(pickle.loads(pickle.dumps(member))) is str
    assert [name.value for name in OptimizerNames][-3:] == NAMES
    with pytest.raises(ValueError, match="is not a valid OptimizerNames"):
        OptimizerNames("tan")


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_command_line_yaml_and_json(tmp_path, kind):
    parser = HfArgumentParser(kind)
    content = {"output_dir": str(tmp_path), "optim": "adatamw", "optim_args": "gamma=0.5,", "use_cpu": True}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "args.json").write_text(json.dumps(content))
    words = ["--output_dir", str(tmp_path), "--optim", "adatamw", "--optim_args", "gamma=0.5,", "--use_cpu"]
    parsed = [
        *parser.parse_args_into_dataclasses(words),
        *parser.parse_yaml_file(tmp_path / "args.yaml"),
        *parser.parse_json_file(tmp_path / "args.json"),
    ]
    assert [(args.optim, args.optim_args) for args in parsed] == [("adatamw", "gamma=0.5")] * 3
    # The first part of what --help prints; the rest of it cannot be formatted in transformers 5.2.
    assert "adatamw,adatam,tam}" in "".join(parser.format_usage().split())


@pytest.mark.parametrize("kind", ["SFTConfig", "DPOConfig"])
def test_trl_configs(tmp_path, kind):
    trl = pytest.importorskip("trl")
    words = ["--output_dir", str(tmp_path), "--optim", "adatamw", "--optim_args", "gamma=0.5", "--use_cpu"]
    (args,) = trl.TrlParser(getattr(trl, kind)).parse_args_and_config([*words, "--bf16", "false"])
    assert (type(args.optim), args.optim) == (str, "adatamw")
    with pytest.raises(ValueError, match="'gama'"):
        getattr(trl, kind)(output_dir=str(tmp_path), optim="adatamw", optim_args="gama=1", use_cpu=True, bf16=False)


def test_set_optimizer(tmp_path):
    args = arguments(tmp_path, "adamw_torch").set_optimizer("adatamw", learning_rate=1e-3, args="gamma=0.5 ,")
    assert (type(args.optim), args.optim, args.optim_args) == (str, "adatamw", "gamma=0.5")
    with pytest.raises(ValueError, match="gamma=2"):
        args.set_optimizer("adatamw", args="gamma=2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim_args": "gamma=1.5"}, ["gamma=1.5", "Invalid gamma value: 1.5", "[0, 1]"]),
        ({"optim_args": "gamma=nan"}, ["Invalid gamma value: nan"]),
        ({"optim_args": "beta1=1"}, ["beta1=1", "index 0: 1.0"]),
        ({"optim_args": "scope=layer"}, ["scope=layer", "'layer'", "'tensor', 'model'"]),
        ({"optim_args": "torque_steps=-1"}, ["torque_steps=-1", "a whole number >= 0"]),
        ({"optim_args": "gama=1"}, ["'gama'", "'gamma'"]),
        ({"adam_beta2": 1.0}, ["--optim adatamw", "index 1: 1.0"]),
        ({"learning_rate": float("nan")}, ["learning rate: nan"]),
        ({"weight_decay": -1.0}, ["weight_decay value: -1.0"]),
    ],
)
def test_bad_values_stop_before_a_model_is_loaded(tmp_path, changes, words):
    with pytest.raises(ValueError, match="optim") as caught:
        arguments(tmp_path, **changes)
    assert [word for word in words if word not in str(caught.value)] == []


def test_other_optimizers_keep_their_own_behaviour(tmp_path):
    args = arguments(tmp_path, "adamw_torch", optim_args="anything=1,")
    assert args.optim is OptimizerNames.ADAMW_TORCH
    assert args.optim_args == "anything=1,"


PLAIN_READER = """
import sys
sys.modules["hf_tam"] = None   # as if it were not installed
import torch
args = torch.load(sys.argv[1], weights_only=False)
print(type(args.optim).__name__, args.optim)
assert not [name for name in sys.modules if name.startswith("hf_tam.")]

# ... and the other order of imports: transformers first, all of it loaded, then hf_tam.
from transformers import Trainer, TrainingArguments
try:
    TrainingArguments(sys.argv[2], optim="adatamw", use_cpu=True)
except ValueError as error:
    assert "adatamw is not a valid OptimizerNames" in str(error)
else:
    raise AssertionError("it is not hf_tam that makes the name known")
del sys.modules["hf_tam"]
import hf_tam
print(TrainingArguments(sys.argv[2], optim="adatamw", use_cpu=True).optim)
print(Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(sys.argv[2], optim="tam", use_cpu=True))[0].__name__)
"""


@pytest.mark.launch
def test_training_args_bin_loads_without_hf_tam_and_hf_tam_may_come_last(tmp_path):
    path = tmp_path / "training_args.bin"
    torch.save(arguments(tmp_path, optim_args="gamma=0.5"), path)
    output = run_successfully([sys.executable, "-c", PLAIN_READER, path, tmp_path / "out"])
    assert output.splitlines()[-3:] == ["str adatamw", "adatamw", "TAM"]
