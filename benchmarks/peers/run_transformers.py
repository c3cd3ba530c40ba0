"""transformers' `generate` on a workload: greedy, float32, padded batches of prompts sorted by length.

    python benchmarks/peer_transformers.py MODEL WORKLOAD.json RESULT.json --threads 2

The time excludes loading and a short warm-up. With --margins it also says, for each row, how far ahead the chosen
tokens were.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

_PAD = 0  # never attended to


def main() -> None:
    """Read the workload, generate, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("workload", type=Path, help="{prompts: [[ids]], output_tokens: N}")
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--margins", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = json.loads(args.workload.read_text())
    prompts, num_output = workload["prompts"], workload["output_tokens"]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()  # that of the model could ask for sampling
    with torch.inference_mode():
        generate(model, prompts[:2], min(2, num_output))
        start = time.perf_counter()
        outputs = generate_sorted(model, prompts, num_output, args.batch_size)
        seconds = time.perf_counter() - start
        margins = [margin(model, *row) for row in zip(prompts, outputs, strict=True)] if args.margins else None
    result = {"version": transformers.__version__, "seconds": seconds, "token_ids": outputs, "margins": margins}
    args.result.write_text(json.dumps(result))


def generate_sorted(
    model: torch.nn.Module, prompts: list[list[int]], num_output: int, batch_size: int
) -> list[list[int]]:
    """Generate for all prompts, those of similar length together; outputs in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    outputs: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, output in zip(rows, generate(model, [prompts[row] for row in rows], num_output), strict=True):
            outputs[row] = output
    return outputs


def generate(model: torch.nn.Module, prompts: list[list[int]], num_output: int) -> list[list[int]]:
    """Generate for one batch, prompts padded on the left; nothing ends a sequence early."""
    length = max(map(len, prompts))
    token_ids = torch.tensor([[_PAD] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(do_sample=False, max_new_tokens=num_output, pad_token_id=_PAD)
    result = model.generate(input_ids=token_ids, attention_mask=mask, generation_config=config)  # type: ignore
    assert result.shape[1] == length + num_output, result.shape
    outputs: list[list[int]] = result[:, length:].tolist()
    return outputs


def margin(model: torch.nn.Module, prompt: list[int], output: list[int]) -> float:
    """Smallest lead of the best logit over the second in an output, relative to the largest absolute logit."""
    token_ids = torch.tensor([prompt + output[:-1]])
    logits = model(input_ids=token_ids, logits_to_keep=len(output)).logits[0]
    best = logits.topk(2).values
    return float(((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).min())


if __name__ == "__main__":
    main()
