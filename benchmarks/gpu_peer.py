"""transformers on the GPU, in this process, beside hpcinfer."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_bench import UnavailableError
from random_model import Shape

sys.path.append(str(Path(__file__).resolve().parent / "peers"))  # its runner, which is a program of its own elsewhere


def runner() -> Any:
    """The functions of benchmarks/peers/run_transformers.py.

    Raises:
        UnavailableError: transformers is not installed.
    """
    try:
        import run_transformers  # type: ignore[import-not-found]
        from transformers.utils import logging
    except ImportError as error:
        raise UnavailableError(f"transformers is not here ({error})") from None
    logging.disable_progress_bar()
    return run_transformers


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model whose weights are rounded to a type, to be computed in that type."""
    model = runner().AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return _ready(model.to(device))


def make_random(shape: Shape, max_len: int, device: torch.device) -> Any:
    """Make a Llama of random weights on the device: bfloat16, attention by torch's fused kernels."""
    auto = runner().AutoModelForCausalLM
    from transformers import LlamaConfig

    config = LlamaConfig(**asdict(shape), max_position_embeddings=max_len, tie_word_embeddings=False)
    with torch.device(device):
        return _ready(auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa"))


def log_probabilities(model: Any, prompt: list[int]) -> list[float]:
    """Log-probability of each token of a prompt but the first."""
    token_ids = torch.tensor([prompt], device=model.device)
    logits = model(input_ids=token_ids).logits[0, :-1].float().log_softmax(-1)
    values: list[float] = logits.gather(1, token_ids[0, 1:, None])[:, 0].tolist()
    return values


def _ready(model: Any) -> Any:
    """Let nothing end a sequence early, and no generation sample."""
    model.generation_config = runner().GenerationConfig()
    return model.eval()
