"""vLLM's CPU backend on a workload: eager mode, at most 64 sequences at once.

    python run_vllm.py MODEL WORKLOAD.json RESULT.json --threads 2 [--reuse-prefixes]
"""

import os

from runner import TokenIds, measure, read_task, write_result

_MAX_NUM_SEQS = 64
_ENVIRONMENT = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}  # GiB


def main() -> None:
    """Load, generate, write the result."""
    task = read_task(__doc__ or "")
    cores = sorted(os.sched_getaffinity(0))[: task.threads]
    os.environ.update(_ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)))
    from vllm import LLM, SamplingParams  # reads the environment

    engine = LLM(
        str(task.model), dtype="float32", max_num_seqs=_MAX_NUM_SEQS, max_model_len=task.max_length,
        enable_prefix_caching=task.reuses_prefixes, disable_log_stats=True, enforce_eager=True,
    )  # fmt: skip

    def generate(prompts: TokenIds, num_output: int) -> TokenIds:
        sampling = SamplingParams(
            temperature=task.temperature, top_p=task.top_p, max_tokens=num_output, ignore_eos=True
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = engine.generate(requests, sampling, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    write_result(task, measure(task, generate), ["vllm-cpu", "torch"])


if __name__ == "__main__":
    main()
