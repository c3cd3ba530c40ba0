"""Convert a Llama of Hugging Face's layout to GGUF with the gguf package: float32, or int8 (Q8_0).

    python prepare_llama_cpp.py MODEL FILE --precision int8

llama.cpp's own script refuses tokenizers that it does not know; here only the ids matter.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_FILE_TYPES = {"f32": 0, "int8": 7}  # of the GGUF format
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--precision", choices=_FILE_TYPES, default="f32")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    writer = gguf.GGUFWriter(args.file, "llama")
    add_config(writer, config, args.precision)
    add_tokenizer(writer, json.loads((args.model / "tokenizer.json").read_text()), config)
    for name, values in load_file(args.model / "model.safetensors").items():
        add_tensor(writer, name, values.astype(np.float32), config, args.precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer: Any, config: dict[str, Any], precision: str) -> None:
    """Write the sizes."""
    writer.add_name("benchmark")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(_FILE_TYPES[precision])


def add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the vocabulary, which llama.cpp wants although it is given ids."""
    vocabulary = tokenizer["model"]["vocab"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges(merges or [" ".join(texts[:2])])  # llama.cpp refuses a model without any
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def add_tensor(writer: Any, name: str, values: np.ndarray, config: dict[str, Any], precision: str) -> None:
    """Write one tensor; those of rotary embedding in the order of llama.cpp, with the halves of a head interleaved."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            halves = values.reshape(config[heads], 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    if precision == "f32" or values.ndim == 1:
        writer.add_tensor(gguf_name(name), values)
    else:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)


def gguf_name(name: str) -> str:
    """Name of a tensor in the GGUF format."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_IN_LAYER[part]}.weight"


if __name__ == "__main__":
    main()
