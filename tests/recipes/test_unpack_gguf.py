"""A GGUF file becomes a model that can be trained and saved."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.comparisons import unpack_gguf

gguf = pytest.importorskip("gguf")
TOKENS = ["<s>", "</s>", "<unk>", "a", "b", "c", "ab", "Ġ"]
WIDTH = 64
MATRICES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_llama(path):
    """A Llama of one block and 8 bits; returns its matrices by name, as the bits have them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    generator, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    matrices = {}
    rows_of = {"token_embd": len(TOKENS)} | {f"blk.0.{name}": WIDTH for name in MATRICES}
    for name, rows in rows_of.items():
        stored = gguf.quants.quantize(generator.standard_normal((rows, WIDTH)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        matrices[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def test_unpacked(tmp_path):
    matrices = write_llama(tmp_path / "tiny.gguf")
    assert unpack_gguf.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "tiny")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer("abc").input_ids == [TOKENS.index("ab"), TOKENS.index("c")]
    assert torch.equal(model.get_input_embeddings().weight, matrices["token_embd"])
    layer = model.model.layers[0]
    for stored, name in MATRICES.items():
        if stored not in ("attn_q", "attn_k"):  # their rows are in another order there
            assert torch.equal(layer.get_submodule(name).weight, matrices[f"blk.0.{stored}"])
    tokens = tokenizer("abc", return_tensors="pt")
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(("content", "reason"), [(None, "there is no file"), ("{}", "cannot be read: ")])
def test_what_is_no_gguf_is_one_line(tmp_path, content, reason, capsys):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_text(content)
    assert unpack_gguf.main([str(path), str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unpack_gguf: ")]
    assert reason in line
    assert str(path) in line
    assert not (tmp_path / "out").exists()
