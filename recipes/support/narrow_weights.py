"""Weights that are trained in bfloat16 lose no step, unless that is asked for."""

from typing import Any

from hf_tam.integrations.transformers.optim_args import parse_optim_args
from hf_tam.integrations.transformers.optimizer_names import OPTIMIZERS
from recipes.support import reporting


def keep_steps(groups: tuple[Any, ...]) -> None:
    """Have what bfloat16 leaves out of trained weights kept, where nothing is said about it; announce that.

    Adapters are fp32 and need none.

    Args:
        groups: the arguments, the Trainer's last; its `optim_args` are written to.
    """
    training = groups[-1]
    of_model = next((group for group in groups if hasattr(group, "use_peft")), None)
    if of_model is None or of_model.use_peft or of_model.dtype != "bfloat16" or training.optim not in OPTIMIZERS:
        return
    if "param_correction" in parse_optim_args(training.optim, training.optim_args):
        return
    training.optim_args = ",".join(filter(None, [training.optim_args, "param_correction=bits16"]))
    reporting.announce(
        "bfloat16 weights are trained: what they leave out is kept in 2 bytes a parameter (optim_args"
        " param_correction=bits16; param_correction=none leaves it out, and most small steps with it)"
    )
