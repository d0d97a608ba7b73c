"""The numbers of the real models that recipes/configs/ is for, and small models of the same classes.

There is no network in the tests, so what decides a model's shape is kept here, each with its source; the rest is the
default of the installed transformers. A configuration whose model is missing here fails its test with that message.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from recipes.support import models
from recipes.support.arguments import ModelArguments

# NF4 with quantised scales: 4 bits, one 8-bit scale for 64 weights, and one of 32 bits for 256 of those.
BYTES_OF_4_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8


@dataclass(frozen=True)
class Architecture:
    """What config.json of a model says of its shape, and who else says so."""

    model_type: str
    shape: dict[str, Any]
    source: str
    class_name: str
    unverified: str = ""

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **copy.deepcopy(self.shape))


def decoder(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any):
    """The seven numbers that most decoders share."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


TORCHTUNE = "torchtune's builder {}, and config.json on the hub as quoted in public repositories"
SLIME = "torchtune's builder {}, and slime's scripts/models/{}.sh"
DEEPMIND = "google-deepmind/gemma, gm/nn, class {}"
SIGLIP_OF_GEMMA3 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}

ARCHITECTURES = {
    "meta-llama/Llama-3.2-1B": Architecture(
        "llama",
        decoder(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
        TORCHTUNE.format("llama3_2_1b"),
        "LlamaForCausalLM",
    ),
    "meta-llama/Llama-3.2-3B": Architecture(
        "llama",
        decoder(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
        TORCHTUNE.format("llama3_2_3b"),
        "LlamaForCausalLM",
    ),
    "meta-llama/Llama-3.1-8B": Architecture(
        "llama",
        decoder(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
        TORCHTUNE.format("llama3_1_8b"),
        "LlamaForCausalLM",
    ),
    "Qwen/Qwen3-0.6B": Architecture(
        "qwen3",
        decoder(1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
        SLIME.format("qwen3_0_6b_instruct", "qwen3-0.6B"),
        "Qwen3ForCausalLM",
    ),
    "Qwen/Qwen3-1.7B": Architecture(
        "qwen3",
        decoder(2048, 6144, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True),
        SLIME.format("qwen3_1_7b_instruct", "qwen3-1.7B"),
        "Qwen3ForCausalLM",
    ),
    "Qwen/Qwen3-4B": Architecture(
        "qwen3",
        decoder(2560, 9728, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=True),
        SLIME.format("qwen3_4b_instruct", "qwen3-4B"),
        "Qwen3ForCausalLM",
    ),
    "Qwen/Qwen3-8B": Architecture(
        "qwen3",
        decoder(4096, 12288, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=False),
        SLIME.format("qwen3_8b_instruct", "qwen3-8B"),
        "Qwen3ForCausalLM",
    ),
    "Qwen/Qwen3-30B-A3B": Architecture(
        "qwen3_moe",
        decoder(
            2048,
            6144,
            48,
            32,
            4,
            151936,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
        ),
        "slime's scripts/models/qwen3-30B-A3B.sh",
        "Qwen3MoeForCausalLM",
    ),
    "Qwen/Qwen3.5-2B": Architecture(
        "qwen3_5_text",
        decoder(
            2048,
            6144,
            24,
            8,
            2,
            248320,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=16,
            tie_word_embeddings=True,
        ),
        "text_config of config.json on the hub as quoted in public repositories",
        "Qwen3_5ForCausalLM",
    ),
    "google/gemma-3-1b-pt": Architecture(
        "gemma3_text",
        decoder(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512),
        DEEPMIND.format("Gemma3_1B"),
        "Gemma3ForCausalLM",
    ),
    "google/gemma-3-4b-pt": Architecture(
        "gemma3",
        {
            "text_config": decoder(2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
            "vision_config": SIGLIP_OF_GEMMA3,
        },
        DEEPMIND.format("Gemma3_4B") + "; the padded vocabulary is transformers' default",
        "Gemma3ForConditionalGeneration",
    ),
    "google/gemma-4-E2B": Architecture(
        "gemma4",
        {
            "text_config": decoder(
                1536,
                6144,
                35,
                8,
                1,
                262144,
                head_dim=256,
                sliding_window=512,
                layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
                num_kv_shared_layers=20,
                use_double_wide_mlp=True,
                hidden_size_per_layer_input=256,
                final_logit_softcapping=30.0,
            ),
            "vision_config": {"use_clipped_linears": True},
            "audio_config": {},
        },
        DEEPMIND.format("Gemma4_E2B"),
        "Gemma4ForConditionalGeneration",
        unverified="the encoders of images and sound, which are transformers' defaults (frozen, so only in the total)",
    ),
    "mistralai/Mistral-7B-v0.3": Architecture(
        "mistral",
        decoder(4096, 14336, 32, 32, 8, 32768, sliding_window=None, tie_word_embeddings=False),
        "torchtune's builder mistral_7b; v0.3 differs by its vocabulary of 32768",
        "MistralForCausalLM",
    ),
    "microsoft/Phi-4-mini-instruct": Architecture(
        "phi3",
        decoder(
            3072,
            8192,
            32,
            24,
            8,
            200064,
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
            bos_token_id=199999,
            eos_token_id=199999,
            pad_token_id=199999,
        ),
        "config.json on the hub as quoted in public repositories",
        "Phi3ForCausalLM",
    ),
    "HuggingFaceTB/SmolLM2-135M": Architecture(
        "llama",
        decoder(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
        "config.json on the hub as quoted in public repositories",
        "LlamaForCausalLM",
    ),
    "HuggingFaceTB/SmolLM2-360M": Architecture(
        "llama",
        decoder(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
        "config.json on the hub as quoted in public repositories",
        "LlamaForCausalLM",
    ),
    "HuggingFaceTB/SmolLM2-1.7B": Architecture(
        "llama",
        decoder(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
        "the SmolLM2 report, arXiv 2502.02737, and the model's name: 1.71B parameters",
        "LlamaForCausalLM",
    ),
    "HuggingFaceTB/SmolLM3-3B": Architecture(
        "smollm3",
        decoder(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True),
        "transformers' own default, which is this model",
        "SmolLM3ForCausalLM",
    ),
    "allenai/Olmo-3-1025-7B": Architecture(
        "olmo3",
        decoder(4096, 11008, 32, 32, 32, 100278, pad_token_id=100277, eos_token_id=100257, tie_word_embeddings=False),
        "transformers' own default but for the vocabulary, which is that of dolma2-tokenizer in public repositories",
        "Olmo3ForCausalLM",
    ),
    "ibm-granite/granite-4.0-1b": Architecture(
        "granitemoehybrid",
        decoder(
            2048,
            4096,
            40,
            16,
            4,
            100352,
            shared_intermediate_size=4096,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=["attention"] * 40,
            position_embedding_type="rope",
            tie_word_embeddings=True,
            pad_token_id=100256,
            bos_token_id=100257,
            eos_token_id=100257,
        ),
        "the metadata of its GGUF file in the registry of ollama",
        "GraniteMoeHybridForCausalLM",
    ),
    "openai/gpt-oss-20b": Architecture(
        "gpt_oss",
        decoder(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4),
        "config.json on the hub as quoted in public repositories",
        "GptOssForCausalLM",
    ),
    "openai-community/gpt2": Architecture(
        "gpt2",
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        "transformers' own default, which is this model",
        "GPT2LMHeadModel",
    ),
}


def adapted_model(name: str, lora: ModelArguments) -> Any:
    """The real architecture with the adapter that a configuration asks for, put there by the recipe's own code."""
    # A fresh one: peft replaces the layers in place.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config(), dtype=torch.float32)
        unquantized = dataclasses.replace(lora, load_in_4bit=False, use_bnb_nested_quant=False)
        return models.add_adapter(model, unquantized, TaskType.CAUSAL_LM)


def memory_in_gb(model: Any, lora: ModelArguments) -> float:
    """Weights, gradients and states by the arithmetic of recipes/README.md; trained ones take 16 bytes a parameter."""
    trained, total = models.count_parameters(model)
    if not lora.use_peft:
        return 16 * total / 1e9
    frozen = {id(param): 2.0 * param.numel() for param in model.parameters() if not param.requires_grad}
    if lora.load_in_4bit:
        output = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not output and id(module.weight) in frozen:
                frozen[id(module.weight)] = BYTES_OF_4_BITS * module.weight.numel()
    return (sum(frozen.values()) + 16 * trained) / 1e9


def activations_in_gb(name: str, lora: ModelArguments, training: Any) -> float:
    """What autograd keeps of a batch of records of `max_length`, counted on the real layers and not measured on a GPU.

    Two and four layers of the real shapes are run on the CPU as TRL runs them, on 128 tokens; what is kept grows by
    the same bytes with each layer and each token, since attention without a mask of its own keeps no square of them.
    """
    first, second = (_kept_bytes(name, lora, num_layers, autocast=bool(training.bf16)) for num_layers in (2, 4))
    tokens = training.per_device_train_batch_size * training.max_length
    layer, others = (second - first) / 2, 2 * first - second
    config = ARCHITECTURES[name].config().get_text_config()
    if training.gradient_checkpointing:  # the input of each layer, and all of the one that is computed again
        size = 2 if lora.dtype == "bfloat16" else 4
        return tokens * (config.num_hidden_layers * size * config.hidden_size + layer + others) / 1e9
    return tokens * (config.num_hidden_layers * layer + others) / 1e9


def _kept_bytes(name: str, lora: ModelArguments, num_layers: int, *, autocast: bool, num_tokens: int = 128) -> float:
    """Bytes a token that a forward pass of a model of so many layers leaves for the backward pass."""
    config = ARCHITECTURES[name].config()
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    # Of dropout in the attention a GPU keeps a seed; shared keys and values need more layers than these.
    for part in ("attention_dropout", "attn_pdrop", "num_kv_shared_layers"):
        if hasattr(text, part):
            setattr(text, part, 0)
    dtype = torch.float32 if lora.dtype == "float32" else torch.bfloat16
    unquantized = dataclasses.replace(lora, load_in_4bit=False, use_bnb_nested_quant=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.config.use_cache = False
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = models.add_adapter(model, unquantized, TaskType.CAUSAL_LM)
    model = model.to_empty(device="cpu").train()  # what the numbers are is nothing to what is kept
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    ids = torch.arange(num_tokens)[None] % text.vocab_size
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    del model
    gc.collect()  # a model is a ring, and the next one of its size would not fit beside it
    return sum(storage.nbytes() for storage in kept.values()) / num_tokens
