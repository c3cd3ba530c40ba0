"""Random Llama models of given shapes in Hugging Face's layout, with a vocabulary whose tokens all have texts."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_STDDEV = 0.02  # of all weights but the norms
_MAX_POSITIONS = 4096  # tokens: room for the workload with long prompts
_TEXTS = sorted(pre_tokenizers.ByteLevel.alphabet())  # of the first 256 tokens


@dataclass(frozen=True)
class Shape:
    """What makes the size of a model; fields have the names of config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512),
    "M1": Shape(768, 12, 12, 4, 2048, 32000),  # 0.125 billion parameters
    "M2": Shape(1024, 24, 16, 4, 2816, 32000),  # 0.34 billion parameters
    "M3": Shape(1280, 24, 20, 4, 3456, 32000),  # 0.5 billion parameters
}


def write_random_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a float32 model whose embeddings are not tied."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32",
        "max_position_embeddings": _MAX_POSITIONS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, **dataclasses.asdict(shape),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_tensors(shape, np.random.default_rng(seed)), folder / "model.safetensors", {"format": "pt"})
    numbered_tokenizer(shape.vocab_size).save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _TEXTS[0], "eos_token": _TEXTS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def _tensors(shape: Shape, generator: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    head_size = hidden // shape.num_attention_heads
    kv_size = shape.num_key_value_heads * head_size
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    layers = range(shape.num_hidden_layers)
    all_sizes = {f"model.layers.{i}.{name}.weight": size for i in layers for name, size in sizes.items()}
    vocabulary = (shape.vocab_size, hidden)
    all_sizes |= {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)}
    return {name: _values(size, generator) for name, size in all_sizes.items()}


def _values(size: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if len(size) == 1:
        return np.ones(size, np.float32)
    return generator.standard_normal(size, np.float32) * np.float32(_STDDEV)


def numbered_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE without merges: a token for each byte, and numbers for the rest of the ids."""
    texts = [*_TEXTS, *(f"Ġ{i}" for i in range(256, vocab_size))]
    tokenizer = Tokenizer(models.BPE({text: token_id for token_id, text in enumerate(texts)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
