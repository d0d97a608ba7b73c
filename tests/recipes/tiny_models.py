"""Models of the classes in architectures.py that train in a second, with a tokenizer that splits words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.recipes.architectures import ARCHITECTURES

CHAT = [
    {"role": "user", "content": "what does the owl eat"},
    {"role": "assistant", "content": "the owl eats mice and frogs"},
    {"role": "user", "content": "and what does the goat eat"},
    {"role": "assistant", "content": "the goat eats grass and leaves"},
]
TEMPLATE = (
    "{% for turn in messages %}{{ '<' + turn['role'] + '> ' }}{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] + ' <end> ' }}{% endgeneration %}"
    "{% else %}{{ turn['content'] + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
VOCABULARY_SIZE = 64
# Every size that an architecture names. What the classes rely on is kept: several query heads to a key-value head,
# more experts than are active, heads of an even size.
_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "vocab_size": VOCABULARY_SIZE, "sliding_window": 8, "moe_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "hidden_size_per_layer_input": 8,
    "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
}  # fmt: skip
# Sizes that the classes have by default, and layers of which a kind needs more than two.
_MORE = {
    "qwen3_5_text": {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["attention"] * 2},
    "gemma4": {
        "vocab_size_per_layer_input": VOCABULARY_SIZE,
        "global_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
}  # fmt: skip
_ENCODERS = {
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16, "use_clipped_linears": True,
        },
        "audio_config": {
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 32,
        },
    },
}  # fmt: skip
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(name: str, folder: Path) -> Path:
    """Save a small model of the class of `name`, with random weights, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    assert type(model).__name__ == ARCHITECTURES[name].class_name
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def tiny_config(name: str) -> Any:
    """The configuration of `name` with every size cut down; what is no size stays: tying, kinds of layers, biases."""
    architecture = ARCHITECTURES[name]
    model_type, shape = architecture.model_type, architecture.shape
    if model_type in _ENCODERS:
        text = _shrink(shape["text_config"], model_type)
        return AutoConfig.for_model(model_type, text_config=text, **copy.deepcopy(_ENCODERS[model_type]))
    return AutoConfig.for_model(model_type, **_shrink(shape, model_type))


def _shrink(shape: dict[str, Any], model_type: str) -> dict[str, Any]:
    sizes = {key: _SIZES[key] for key, value in shape.items() if key in _SIZES and value}
    if "num_key_value_heads" in shape:
        shared = shape["num_attention_heads"] // shape["num_key_value_heads"]
        sizes["num_key_value_heads"] = max(1, _SIZES["num_attention_heads"] // min(shared, 4))
    return {**shape, **sizes, **_TOKEN_IDS, **copy.deepcopy(_MORE.get(model_type, {}))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens; the chat template marks the assistant's turns."""
    words = sorted({word for turn in CHAT for word in turn["content"].split()})
    vocabulary = ["<pad>", "<begin>", "<end>", "<unknown>", "<user>", "<assistant>", "<system>", *words]
    assert len(vocabulary) <= VOCABULARY_SIZE
    pieces = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unknown>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unknown>",
        chat_template=TEMPLATE,
    )
