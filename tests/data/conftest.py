"""Two small tokenizers, one of each family, made from a few sentences."""

import json
import pydoc_data.topics

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hpcinfer.data import tokenizer as data

FAST = "PreTrainedTokenizerFast"
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = [*list(pydoc_data.topics.topics.values())[:6], "Größe 東京 🙂 naïve", "    indented\n\n\ttext"]


def _files(tokenizer: Tokenizer, config: dict) -> dict[str, bytes]:
    content = tokenizer.to_str().encode()
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config).encode()}


@pytest.fixture(scope="session")
def byte_level_files() -> dict[str, bytes]:
    """A tokenizer as GPT-2's and Llama 3's, that begins prompts with <|begin|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<think é>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    end = {"__type": "AddedToken", "content": "<|end|>", "special": True}
    config = {"tokenizer_class": FAST, "bos_token": "<|begin|>", "eos_token": end, "chat_template": CHAT}
    return _files(tokenizer, config)


@pytest.fixture(scope="session")
def sentencepiece_files() -> dict[str, bytes]:
    """A tokenizer as Llama 2's: visible spaces, byte fallback, a leading space that decoding drops."""
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(["the cat sat on the mat and the dog sat too"] * 4, trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [*special, *fallback, *(piece for piece in learned["vocab"] if piece not in special)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"tokenizer_class": FAST, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _files(tokenizer, config)


@pytest.fixture(scope="session")
def byte_level(byte_level_files: dict[str, bytes]) -> data.Tokenizer:
    """hpcinfer's tokenizer over the byte-level files."""
    return data.Tokenizer(byte_level_files)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_files: dict[str, bytes]) -> data.Tokenizer:
    """hpcinfer's tokenizer over the SentencePiece-like files."""
    return data.Tokenizer(sentencepiece_files)
