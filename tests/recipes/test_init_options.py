"""--model_init_kwargs reaches every model that is loaded, and what no model takes is one line."""

import json
import math

import pytest
from transformers import AutoConfig

from tests.recipes.test_dpo import dpo  # noqa: F401
from tests.recipes.test_sft_options import QUICK, error_of, results_of


@pytest.mark.long
def test_the_reference_of_dpo_is_loaded_alike(dpo):  # noqa: F811
    """With a layer more than the policy, the first loss would not be ln 2."""
    one_layer = json.dumps({"num_hidden_layers": 1})
    status, _, error = dpo("--dataset_name=demo", f"--model_init_kwargs={one_layer}", full=True)
    assert status == 0, error
    results = results_of(dpo.output_dir)
    assert results["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert results["eval_rewards/margins_before"] == 0.0
    assert AutoConfig.from_pretrained(dpo.output_dir).num_hidden_layers == 1


@pytest.mark.long
def test_the_merged_model_is_loaded_alike(sft):
    status, _, error = sft(*QUICK, '--model_init_kwargs={"num_hidden_layers": 1}', "--merge")
    assert status == 0, error
    assert AutoConfig.from_pretrained(sft.output_dir / "merged").num_hidden_layers == 1


@pytest.mark.long
def test_what_has_a_flag_goes_before_it(sft):
    """As in TRL's scripts, of which one file is to do."""
    status, _, error = sft(
        *QUICK, '--model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"}', full=True
    )
    assert status == 0, error
    assert str(AutoConfig.from_pretrained(sft.output_dir).dtype) == "torch.bfloat16"
    assert results_of(sft.output_dir)["settings"]["LmModelArguments"]["attn_implementation"] == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, "model_init_kwargs = {'foo': 1}: the model is not loaded with that: "),
        ({"num_hidden_layers": "two"}, "model_init_kwargs = {'num_hidden_layers': 'two'}: the model is not loaded"),
        ({"hidden_size": 32}, "model_init_kwargs = {'hidden_size': 32}: the model is not loaded with that: "),
        ({"dtype": "float8"}, "model_init_kwargs: dtype = float8: there are auto, bfloat16, float16, float32"),
        ({"quantization_config": {}}, "asked for by --load_in_4bit"),
    ],
)
def test_what_no_model_takes_is_one_line(options, message, sft):
    status, _, error = sft(*QUICK, f"--model_init_kwargs={json.dumps(options)}")
    assert status == 1
    assert message in error_of(error)
    assert not sft.output_dir.exists()
