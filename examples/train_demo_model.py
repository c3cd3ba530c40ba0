"""Train the demo model: a 5-million-parameter Llama that writes Python documentation.

The corpus is in demo_corpus.py; nothing is downloaded. The result is a folder in Hugging Face layout. Needs torch (2.9
or later), tokenizers and safetensors.

    python examples/train_demo_model.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from demo_corpus import BEGIN, CHAT_TEMPLATE, END, SPECIAL_TOKENS, Document, load_corpus, render, train_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """The model's shape; the field names are those of Hugging Face's config.json."""

    hidden_size: int = 256  # width of the residual stream
    intermediate_size: int = 1024  # width of the feed-forward block
    num_hidden_layers: int = 4
    num_attention_heads: int = 8  # of the queries
    num_key_value_heads: int = 4  # each serves two query heads
    head_dim: int = 32
    vocab_size: int = 4096  # with the four special tokens
    max_position_embeddings: int = 1024  # tokens
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Training:
    """How the model is trained."""

    steps: int  # optimizer steps, unless the minutes end first
    minutes: float  # wall-clock limit
    seed: int  # of the initial weights, the documents' order and the dropout
    batch_tokens: int = 4096  # per step
    length: int = 512  # tokens per row
    last_length: int = 1024  # the same in the last tenth of the steps
    muon_lr: float = 0.02  # of the layers' matrices
    adamw_lr: float = 0.01  # of the embedding and the norms
    weight_decay: float = 0.1
    dropout: float = 0.1


class TokenStream:
    """An endless stream of tokens: every epoch shuffles the documents and writes them anew."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seed: int) -> None:
        self.documents, self.tokenizer, self.rng = list(documents), tokenizer, random.Random(seed)
        self.buffer = torch.empty(0, dtype=torch.long)
        self.num_epochs = 0

    def take(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both [rows, length]."""
        count = rows * length
        while len(self.buffer) <= count:
            self.rng.shuffle(self.documents)
            texts = [render(document, self.rng) for document in self.documents]
            encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            self.buffer = torch.cat([self.buffer] + [torch.tensor(item.ids) for item in encoded])
            self.num_epochs += 1
        inputs, targets = self.buffer[:count], self.buffer[1 : count + 1]
        self.buffer = self.buffer[count:]
        return inputs.view(rows, length), targets.view(rows, length)


class Attention(nn.Module):
    """Causal attention with rotary positions and fewer key than query heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.repeat = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = self.rotate(q), self.rotate(k).repeat_interleave(self.repeat, dim=1)
        out = F.scaled_dot_product_attention(q, k, v.repeat_interleave(self.repeat, dim=1), is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn each pair of dims (i, i + head_dim / 2) by an angle that grows with the position."""
        frequency = self.theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = torch.outer(torch.arange(x.shape[2]), frequency)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer; dropout is on what each block adds."""

    def __init__(self, config: Config, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x)))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """The model; its parameters have the names that Hugging Face gives them, less the prefix `model.`."""

    def __init__(self, config: Config, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits, [rows, length, vocab]."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets, in nats; targets of -100 do not count."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class HeldOutLoss(NamedTuple):
    """The loss on documents that were never trained on."""

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def held_out_loss(model: Llama, documents: list[Document], tokenizer: Tokenizer, length: int) -> HeldOutLoss:
    """Measure the loss on titled documents, each read from its begin token in windows of `length`."""
    texts = [f"{document.name}\n\n{document.text}" for document in documents]
    end = tokenizer.token_to_id(END)
    encoded = [torch.tensor([*item.ids, end]) for item in tokenizer.encode_batch(texts)]
    windows = [ids[i : i + length + 1] for ids in encoded for i in range(0, len(ids) - 1, length)]
    windows.sort(key=len)
    model.eval()
    nats, count = 0.0, 0
    for i in range(0, len(windows), 8):
        batch = nn.utils.rnn.pad_sequence(windows[i : i + 8], batch_first=True, padding_value=-100)
        targets = batch[:, 1:]
        num_targets = int((targets != -100).sum())
        nats += model.loss(batch[:, :-1].clamp(min=0), targets).item() * num_targets
        count += num_targets
    model.train()
    return HeldOutLoss(nats / count, nats / math.log(2) / sum(len(text.encode()) for text in texts))


def make_optimizers(model: Llama, training: Training) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    embedding = {"params": [model.embed_tokens.weight], "weight_decay": training.weight_decay}
    return [
        torch.optim.Muon(matrices, lr=training.muon_lr, weight_decay=training.weight_decay),
        torch.optim.AdamW([embedding, norms], lr=training.adamw_lr, betas=(0.9, 0.95)),
    ]


def rate_factor(progress: float) -> float:
    """Return the learning rate relative to its peak: a short warm-up, a plateau, a linear decay to zero."""
    return min(1.0, 0.01 + progress / 0.02, (1.0 - progress) / 0.6)


def train(model: Llama, stream: TokenStream, training: Training) -> None:
    """Train until the steps are done or the minutes are over; `progress` goes from 0 to 1."""
    optimizers = make_optimizers(model, training)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, progress, step = time.monotonic(), 0.0, 0
    while progress < 1.0:
        length = training.length if progress < 0.9 else training.last_length
        loss = model.loss(*stream.take(training.batch_tokens // length, length))
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_factor(progress)
            optimizer.step()
        model.zero_grad()
        step += 1
        seconds = time.monotonic() - start
        progress = max(step / training.steps, seconds / (60 * training.minutes))
        if step % 20 == 0 or progress >= 1.0:
            print(f"step {step}  epoch {stream.num_epochs}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def export(model: Llama, config: Config, tokenizer: Tokenizer, output: Path) -> None:
    """Write the model in Hugging Face layout; each file appears whole, by a rename."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        weights = {f"model.{name}": value.bfloat16().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        tokenizer.save(f"{folder}/tokenizer.json")
        for name, content in json_files(config).items():
            Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            os.replace(path, output / path.name)


def json_files(config: Config) -> dict[str, dict]:
    """Return the contents of the JSON files beside the weights, by file name."""
    ids = {"bos_token_id": SPECIAL_TOKENS.index(BEGIN), "eos_token_id": SPECIAL_TOKENS.index(END)}
    architecture = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    biases = {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02}
    tied = {"tie_word_embeddings": True, "dtype": "bfloat16", "torch_dtype": "bfloat16", "use_cache": True}
    return {
        "config.json": {**architecture, **asdict(config), **biases, **tied, **ids},
        "generation_config.json": {"do_sample": False, **ids, "pad_token_id": ids["eos_token_id"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo_model", help="folder to write")
    parser.add_argument("--steps", type=int, default=1900, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by then (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Build the corpus, train the tokenizer and the model, export both and print the held-out loss."""
    args, config = parse_args(), Config()
    training = Training(args.steps, args.minutes, args.seed)
    torch.manual_seed(training.seed)
    torch.set_num_threads(args.threads)
    documents = load_corpus()
    known = [document for document in documents if not document.is_held_out]
    held_out = [document for document in documents if document.is_held_out]
    print(f"{len(known)} documents to train on, {len(held_out)} held out", flush=True)
    tokenizer = train_tokenizer(known, config.vocab_size)
    model = Llama(config, training.dropout)
    train(model, TokenStream(known, tokenizer, training.seed), training)
    model.bfloat16().float()  # the loss is that of the weights as exported
    loss = held_out_loss(model, held_out, tokenizer, config.max_position_embeddings)
    print(f"held-out loss {loss.nats_per_token:.3f} nats/token, {loss.bits_per_byte:.3f} bits/byte")
    export(model, config, tokenizer, args.output)


if __name__ == "__main__":
    main()
