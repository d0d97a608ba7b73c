"""What an argument is called elsewhere, and the nearest name to one that nobody knows."""

import difflib

# From axolotl's configuration reference (docs.axolotl.ai), LLaMA-Factory's hparams (src/llamafactory/hparams), TRL's
# ModelConfig and earlier arguments of transformers. Several names where the recipes differ: the first that is known.
_OURS = {
    # axolotl
    "base_model": ("model_name_or_path",),
    "adapter": ("use_peft",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "num_epochs": ("num_train_epochs",),
    "sequence_len": ("max_length", "max_completion_length"),
    "sample_packing": ("packing",),
    "val_set_size": ("validation_fraction",),
    "datasets": ("train_file", "dataset_name"),
    "optimizer": ("optim",),
    "lr_scheduler": ("lr_scheduler_type",),
    "lora_target_linear": ("lora_target_modules",),
    "chat_template_jinja": ("chat_template_path",),
    "dataset_processes": ("dataset_num_proc",),
    "flash_attention": ("attn_implementation",),
    "peft_use_dora": ("use_dora",),
    "peft_use_rslora": ("use_rslora",),
    "rl_beta": ("beta",),
    # LLaMA-Factory
    "finetuning_type": ("use_peft",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "additional_target": ("lora_modules_to_save",),
    "cutoff_len": ("max_length", "max_completion_length"),
    "val_size": ("validation_fraction",),
    "template": ("chat_template_path",),
    "dataset": ("dataset_name",),
    "eval_dataset": ("validation_file",),
    "preprocessing_num_workers": ("dataset_num_proc",),
    "quantization_bit": ("load_in_4bit",),
    "flash_attn": ("attn_implementation",),
    "pref_beta": ("beta",),
    # The recipes themselves, before they took TRL's names
    "full": ("use_peft",),
    "modules_to_save": ("lora_modules_to_save",),
    "chat_template": ("chat_template_path",),
    "text_column": ("dataset_text_field",),
    "dataset_config_name": ("dataset_config",),
    # TRL, earlier
    "torch_dtype": ("dtype",),
    "max_seq_length": ("max_length",),
    "max_prompt_length": ("max_length",),
    "bnb_4bit_use_double_quant": ("use_bnb_nested_quant",),
    # transformers, before its fifth version and after
    "evaluation_strategy": ("eval_strategy",),
    "warmup_ratio": ("warmup_steps",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "per_gpu_train_batch_size": ("per_device_train_batch_size",),
    "no_cuda": ("use_cpu",),
}
# What only the choice of the script says.
_SCRIPTS = {
    "stage": "the script says it: sft.py, dpo.py; trl/reward and trl/grpo for TRL's own commands",
    "rlhf": "the script says it: dpo.py, or a file of configs/trl for TRL's own commands",
}


def nearest(name: str, known: list[str], *, prefix: str = "") -> str:
    """Return what to say of an unknown name, to be put after the sentence that calls it so; or nothing.

    Args:
        name: An argument, with underscores.
        known: All arguments that there are.
        prefix: Of what is suggested.
    """
    if name in _SCRIPTS:
        return f"; {_SCRIPTS[name]}"
    matches = [ours for ours in _OURS.get(name, ()) if ours in known] or _close_matches(name, known)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def _close_matches(name: str, known: list[str]) -> list[str]:
    matches = difflib.get_close_matches(name, known, n=5)
    # Another ending is nearer at times, but the first word is seldom what somebody got wrong.
    return [match for match in matches if match.split("_")[0] == name.split("_")[0]] or matches
