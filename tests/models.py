"""Tiny random Hugging Face models of every family, with a small byte-level BPE tokenizer, for tests.

Usage: `from models import make_tiny_model` (tests/ is on the path). Needs torch and transformers. Every parameter is
random, also the norms and biases that a fresh model has at one and zero, so that forgetting one of them shows.
"""

import functools
import json
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
BOS, EOS = "<|begin|>", "<|end|>"
SPECIAL_TOKENS = (BOS, EOS, "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"rope_parameters": _LLAMA3_ROPE},
    "mistral": {"sliding_window": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
_SENTENCES = (
    "The list of files is read line by line, and each line becomes one row of the output.",
    "Return a new string with all characters converted to lower case. If the argument is not given, raise an error.",
    "hello world, the quick brown fox jumps over the lazy dog; 0123456789 + - * / = ( ) [ ] { } < > ? ! @ # $ %",
    "def main(arguments): return sum(value for value in arguments if value is not None)",
    "Größe, Straße, naïve café, 日本語, 🙂",
)


def make_tiny_model(
    folder: Path, family: str, *, dtype: str = "float32", seed: int = 0, shards: bool = False, **overrides: Any
) -> Path:
    """Write a random model in Hugging Face's layout.

    Args:
        folder: created; holds config.json, safetensors, tokenizer.json and what belongs to it.
        family: one of FAMILIES ("llama3" has llama3 rope scaling, "mistral" a window of 12).
        dtype: float32, bfloat16 or float16, of every tensor.
        seed: of the random weights.
        shards: several safetensors files with an index, not one.
        overrides: keys of config.json, as num_key_value_heads=1 or tie_word_embeddings=True.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer_json, vocab_size = tiny_tokenizer(adds_bos=not family.startswith("qwen"))
    options = {"vocab_size": vocab_size, **_SHAPE, **_FAMILY_OPTIONS[family], **overrides}
    model = AutoModelForCausalLM.from_config(_config_class(family)(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    _write_tokenizer(Path(folder), tokenizer_json)
    return Path(folder)


def _config_class(family: str) -> Any:
    import transformers

    names = {"llama": "Llama", "llama3": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return getattr(transformers, names[family] + "Config")


@functools.lru_cache
def tiny_tokenizer(adds_bos: bool) -> tuple[str, int]:
    """Train the tokenizer of all tiny models once per process: its JSON and its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, 0)])
    return tokenizer.to_str(), tokenizer.get_vocab_size()


def _write_tokenizer(folder: Path, tokenizer_json: str) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
