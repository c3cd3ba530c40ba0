"""transformers' `generate` on a workload: float32, padded batches of prompts sorted by length.

    python run_transformers.py MODEL WORKLOAD.json RESULT.json --threads 2

With --margins it also says, for each row, how far ahead the chosen tokens were.
"""

import torch
from runner import TokenIds, measure, read_task, write_result
from transformers import AutoModelForCausalLM, GenerationConfig

_PAD = 0  # never attended to
_BATCH_ROWS = 32
_BATCH_TOKENS = 16384  # padded, with the output: keeps the attention of long prompts in memory


def main() -> None:
    """Load, generate, write the result."""
    task = read_task(__doc__ or "")
    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()  # that of the model could ask for sampling
    with torch.inference_mode():
        how = {"do_sample": True, "temperature": task.temperature, "top_p": task.top_p, "top_k": 0}
        how = how if task.temperature > 0 else {}
        measured = measure(task, lambda prompts, num_output: generate_sorted(model, prompts, num_output, **how))
        rows = zip(task.prompts, measured[1], strict=True)
        margins = [margin(model, *row) for row in rows] if task.wants_margins else None
    write_result(task, measured, ["transformers", "torch"], margins=margins)


def generate_sorted(model: torch.nn.Module, prompts: TokenIds, num_output: int, **how: object) -> TokenIds:
    """Generate for all prompts, those of similar length together; outputs in the order of the prompts."""
    outputs: TokenIds = [[] for _ in prompts]
    for rows in batches([len(prompt) + num_output for prompt in prompts]):
        found = generate(model, [prompts[row] for row in rows], num_output, **how)
        for row, output in zip(rows, found, strict=True):
            outputs[row] = output
    return outputs


def batches(lengths: list[int]) -> list[list[int]]:
    """Cut rows sorted by length into batches that are neither too many rows nor too many padded tokens."""
    result: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch_rows = min(_BATCH_ROWS, _BATCH_TOKENS // lengths[row])
        if not result or len(result[-1]) >= batch_rows:
            result.append([])
        result[-1].append(row)
    return result


def generate(model: torch.nn.Module, prompts: TokenIds, num_output: int, **how: object) -> TokenIds:
    """Generate for one batch, prompts padded on the left, greedily if nothing else is said; nothing ends early."""
    length = max(map(len, prompts))
    device = next(model.parameters()).device
    token_ids = torch.tensor([[_PAD] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = GenerationConfig(**how, max_new_tokens=num_output, pad_token_id=_PAD)
    result = model.generate(input_ids=token_ids, attention_mask=mask, generation_config=config)  # type: ignore
    outputs: TokenIds = result[:, length:].tolist()
    return outputs


def margin(model: torch.nn.Module, prompt: list[int], output: list[int]) -> float:
    """Smallest lead of an output, see `leads`."""
    return min(leads(model, prompt, output))


def leads(model: torch.nn.Module, prompt: list[int], output: list[int]) -> list[float]:
    """Lead of the best logit over the second at each token of an output, relative to the largest absolute logit."""
    token_ids = torch.tensor([prompt + output[:-1]], device=next(model.parameters()).device)
    logits = model(input_ids=token_ids, logits_to_keep=len(output)).logits[0]
    best = logits.topk(2).values
    result: list[float] = ((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).tolist()
    return result


if __name__ == "__main__":
    main()
