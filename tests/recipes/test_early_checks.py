"""What is said before a model is loaded, of arguments that transformers takes and then cannot use."""

import pytest

from tests.recipes.test_sft_options import QUICK, error_of

BAD = {
    "rate": (["--learning_rate=1e30"], "learning_rate = 1e+30: above 100 nothing is learned"),
    "rate below": (["--learning_rate=-1", "--optim=adamw_torch"], "learning_rate = -1.0: must be"),
    "no number": (["--learning_rate=nan", "--optim=adamw_torch"], "learning_rate = nan: must be"),
    "tracker": (["--report_to", "wandb"], "report_to = wandb: not installed (pip install wandb)"),
    "unknown tracker": (["--report_to", "papertrail"], "report_to = papertrail: not installed"),
    "liger": (["--use_liger_kernel"], "liger-kernel is not installed: pip install liger-kernel"),
    "best of nothing": (["--save_strategy=best", "--eval_strategy=no"], "save_strategy = best: nothing is evaluated"),
    "loftq": (["--init_lora_weights=loftq"], "add --load_in_4bit"),
    "pissa": (["--init_lora_weights=pissa", "--load_in_4bit"], "which quantised weights do not take"),
    "length": (["--max_length=0"], "max_length = 0: must be at least 1"),
    "end": (["--truncation_mode=keep_end"], "truncation_mode = keep_end: records that are too long lose their end"),
    "padding": (["--padding_free=true"], "padding_free = true: only packed rows"),
    "metrics": (["--batch_eval_metrics=true"], "batch_eval_metrics = true: metrics are taken over all records"),
    "how low": (["--lr_scheduler_type=cosine_with_min_lr"], "cosine_with_min_lr: say how low"),
    "no token": (["--eos_token=<|nothing|>"], "eos_token = <|nothing|>: the tokenizer has no such token"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_one_line_and_nothing_written(flags, message, sft):
    status, _, error = sft(*QUICK, *flags)
    assert status == 1
    assert message in error_of(error)
    assert not sft.output_dir.exists()


@pytest.mark.long
def test_the_best_by_its_loss(sft):
    """transformers ends in a KeyError where nothing says what is best by."""
    status, _, error = sft(*QUICK, "--save_strategy=best", "--eval_strategy=steps", "--eval_steps=1")
    assert status == 0, error
    assert list(sft.output_dir.glob("checkpoint-*"))
