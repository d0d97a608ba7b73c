"""The model that the scripts for supervised fine-tuning train, whole or cut by tensor parallelism."""

from typing import Any

from transformers import AutoModelForCausalLM

from recipes.support import models, parallel
from recipes.support.arguments import LoraArguments, SftModelArguments


def load(arguments: SftModelArguments, lora: LoraArguments, *, saves_state: bool) -> tuple[Any, Any]:
    """Return the tokenizer and the model, without an adapter.

    Args:
        arguments: which model, and over how many processes it is cut.
        lora: which layers are to get an adapter.
        saves_state: whether the run writes checkpoints that hold the optimizer.

    Raises:
        RecipeError: the model cannot be loaded, or tensor parallelism cannot work with it or with these arguments.
    """
    tokenizer = models.load_tokenizer(arguments)
    tp_size = parallel.tensor_parallel_size(arguments)
    if tp_size > 1:
        parallel.require_tensor_parallel(models.load_config(arguments), lora, saves_state=saves_state)
    return tokenizer, models.load_model(AutoModelForCausalLM, arguments, tp_size=tp_size, lora=lora)
