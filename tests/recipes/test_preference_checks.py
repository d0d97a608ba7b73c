"""What dpo.py says before a model is loaded, of arguments that TRL takes and then cannot use."""

import re

import pytest
from trl import DPOConfig

from recipes.support import preference_checks
from tests.recipes.test_dpo import dpo  # noqa: F401
from tests.recipes.test_sft_options import error_of

BAD = {
    "loss": (["--loss_type", "simpo"], "loss_type = simpo: there are sigmoid, hinge"),
    "one of two losses": (["--loss_type", "sigmoid", "simpo"], "loss_type = simpo: there are sigmoid, hinge"),
    "divergence": (["--f_divergence_type=foo"], "f_divergence_type = foo: there are reverse_kl"),
    "divergence of a loss": (
        ["--f_divergence_type=forward_kl", "--loss_type=nca_pair"],
        "f_divergence_type = forward_kl: not with loss_type nca_pair",
    ),
    "exo": (["--loss_type=exo_pair"], "label_smoothing = 0.0: exo_pair takes one above 0 and below 1: give 1e-3"),
    "robust": (["--loss_type=robust", "--label_smoothing=0.5"], "label_smoothing = 0.5: robust takes"),
    "discopop": (["--loss_type=discopop", "--discopop_tau=0"], "discopop_tau = 0.0: must be above 0"),
    "no beta": (["--beta=0"], "beta = 0.0: must be above 0, or no preference is learned"),
    "beta below": (["--beta=-0.1"], "beta = -0.1: must be above 0"),
    "beta is no number": (["--beta=nan"], "beta = nan: must be above 0"),
    "ld_alpha": (["--ld_alpha=2"], "ld_alpha = 2.0: must be from 0 to 1"),
    "weighting": (["--use_weighting", "--loss_type=aot"], "use_weighting: aot sorts the pairs"),
    "adapter with a reference that moves": (
        ["--sync_ref_model", "--use_peft"],
        "sync_ref_model: an adapter's reference is the model below it",
    ),
    "computed before it moves": (
        ["--sync_ref_model", "--precompute_ref_log_probs"],
        "sync_ref_model and precompute_ref_log_probs exclude each other",
    ),
    "steps": (["--sync_ref_model", "--ref_model_sync_steps=0"], "ref_model_sync_steps = 0: must be at least 1"),
    "mixup": (["--sync_ref_model", "--ref_model_mixup_alpha=0"], "ref_model_mixup_alpha = 0.0: must be above 0"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_one_line_and_nothing_written(flags, message, dpo):  # noqa: F811
    status, _, error = dpo("--dataset_name=demo", *flags, full=True)
    assert status == 1
    assert message in error_of(error)
    assert not dpo.output_dir.exists()


@pytest.mark.parametrize(
    ("field", "known"),
    [("loss_type", preference_checks.LOSS_TYPES), ("f_divergence_type", preference_checks.DIVERGENCES)],
)
def test_what_there_is_is_what_trl_names(field, known):
    listed = DPOConfig.__dataclass_fields__[field].metadata["help"].partition("Possible values are")[2]
    assert tuple(re.findall(r"[`']([a-z_]+)[`']", listed.split(". ")[0])) == known


def test_losses_that_take_a_divergence_are_those_that_trl_names():
    listed = DPOConfig.__dataclass_fields__["f_divergence_type"].metadata["help"].partition("difference support")[2]
    assert set(re.findall(r"'([a-z_]+)'", listed)) == set(preference_checks.OF_A_DIFFERENCE)


@pytest.mark.long
def test_a_reference_that_moved_is_not_resumed(dpo):  # noqa: F811
    """No checkpoint holds it; TRL loads the first one anew: https://github.com/huggingface/trl/pull/1593."""
    flags = ["--dataset_name=demo", "--max_train_samples=8", "--sync_ref_model", "--save_strategy=steps"]
    flags += ["--save_steps=1", "--num_sample_generations=0"]
    status, _, error = dpo(*flags, full=True)
    assert status == 0, error
    status, _, error = dpo(*flags, "--resume_from_checkpoint=true", "--max_steps=4", full=True)
    assert status == 1
    assert "holds no reference, which sync_ref_model had moved" in error_of(error)
