"""The causal language model that is trained: whole, quantised or cut, with the adapter that it has or gets."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, PeftModel, TaskType
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import find_adapter_config_file

from hf_tam.integrations.peft import find_wrapped_adapters
from recipes.support import models, parallel, quantization, reporting
from recipes.support.arguments import LmModelArguments, is_adapter_folder
from recipes.support.checkpoints import wants_resume
from recipes.support.errors import RecipeError

BASE_NAME = "base"


def resolve(arguments: LmModelArguments, training: TrainingArguments) -> None:
    """Tell a base from an adapter on it, and merge the two first where a new start was asked for; says which it is.

    Changes `arguments`: then `model_name_or_path` names a base and `adapter_name_or_path` the adapter to train on, if
    any. A merged model is written to output_dir/base, which a new adapter names as its base.

    Communication: a barrier, with several processes, where something is merged.

    Raises:
        RecipeError: there is no such adapter, or its base is unknown.
    """
    name = arguments.model_name_or_path
    if arguments.adapter_name_or_path is None:
        if not name or find_adapter_config_file(name, revision=arguments.model_revision) is None:
            return
        arguments.adapter_name_or_path, arguments.model_name_or_path = name, _base_of(name)
    adapter = arguments.adapter_name_or_path
    if Path(adapter).is_dir() and not is_adapter_folder(adapter):
        raise RecipeError(
            f"adapter_name_or_path {adapter} holds no adapter_config.json: name a folder that peft saved."
        )
    if not arguments.model_name_or_path:
        arguments.model_name_or_path = _base_of(adapter)
    if arguments.adapter_start == "continue":
        reporting.announce(
            f"training the adapter in {adapter} on, on its base {arguments.model_name_or_path}: rank and layers are"
            " its own (--adapter_start merge: merge it first and start anew)"
        )
        return
    folder = Path(training.output_dir) / BASE_NAME
    _merge_on_one_process(arguments, folder, keep=wants_resume(training.resume_from_checkpoint))
    what = "a new adapter on it is trained" if arguments.use_peft else "all of its weights are trained"
    reporting.announce(f"{adapter} and its base {arguments.model_name_or_path} are one model now, {folder}: {what}")
    arguments.model_name_or_path, arguments.adapter_name_or_path = str(folder), None


def load_tokenizer(arguments: LmModelArguments) -> Any:
    """Load the tokenizer, of the adapter where it brought one, as `models.load_tokenizer` does."""
    adapter = arguments.adapter_name_or_path
    if adapter and (Path(adapter) / "tokenizer_config.json").is_file():
        arguments = dataclasses.replace(arguments, model_name_or_path=adapter, adapter_name_or_path=None)
    return models.load_tokenizer(arguments)


def load(arguments: LmModelArguments, *, saves_state: bool, options: dict[str, Any] | None = None) -> Any:
    """Load the weights that `resolve` left named, without a new adapter, and with the one to train on.

    Args:
        arguments: which model, and over how many processes it is cut.
        saves_state: whether the run writes checkpoints that hold the optimizer.
        options: what `from_pretrained` takes besides.

    Raises:
        RecipeError: the model or its adapter cannot be loaded, or tensor parallelism cannot work with it or with
            these arguments.
    """
    tp_size = parallel.tensor_parallel_size(arguments)
    if tp_size > 1:
        parallel.require_tensor_parallel(models.load_config(arguments), arguments, saves_state=saves_state)
    model = models.load_model(
        AutoModelForCausalLM, arguments, tp_size=tp_size, quantize=arguments.has_adapter, **(options or {})
    )
    if arguments.adapter_name_or_path is None:
        return model
    find_wrapped_adapters()
    if quantization.is_quantized(model):
        reporting.announce("the adapter was trained on these weights as they were then: quantised anew, they are near")
    return _with_adapter(model, arguments.adapter_name_or_path, is_trainable=True)


def add_adapter(model: Any, arguments: LmModelArguments) -> Any:
    """Put a new adapter on `model` if it is to get one; see `models.add_adapter`."""
    if isinstance(model, PeftModel):
        return model
    return models.add_adapter(model, arguments, TaskType.CAUSAL_LM)


def drop_reference(model: Any) -> None:
    """Take away the copy that TRL (1.16) has made of an adapter as the reference of DPO, or it is saved beside it."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def _base_of(adapter: str) -> str:
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"adapter '{adapter}' cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not base:
        raise RecipeError(f"adapter '{adapter}' does not say what its base is: name that by --model_name_or_path.")
    return str(base)


def _with_adapter(model: Any, adapter: str, *, is_trainable: bool) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"adapter '{adapter}' does not fit its base: {' '.join(str(error).split())[:300]}"
        ) from error


def _merge_on_one_process(arguments: LmModelArguments, folder: Path, *, keep: bool) -> None:
    state = PartialState()
    with state.local_main_process_first():
        if not state.is_local_main_process or (keep and folder.is_dir()):
            return
        tokenizer = load_tokenizer(arguments)
        base = models.load_model(AutoModelForCausalLM, arguments)
        merged = _with_adapter(base, str(arguments.adapter_name_or_path), is_trainable=False)
        merged = merged.merge_and_unload(safe_merge=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
