"""OpenVINO GenAI's continuous batching on a workload, at most 32 sequences at once.

    python run_openvino.py MODEL WORKLOAD.json RESULT.json --threads 2 --precision int8 [--reuse-prefixes]

MODEL is what prepare_openvino.py made. With float32 weights the arithmetic is float32 too; otherwise, and for the KV
cache, OpenVINO's own defaults for the machine stand.
"""

import numpy as np
import openvino
import openvino_genai
from runner import Task, TokenIds, measure, read_task, write_result

_MAX_NUM_SEQS = 32
_MAX_NUM_BATCHED_TOKENS = 512


def main() -> None:
    """Load, generate, write the result."""
    task = read_task(__doc__ or "")
    properties = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY"}
    if task.precision == "f32":
        properties["INFERENCE_PRECISION_HINT"] = "f32"  # bfloat16 otherwise, on CPUs that have it
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(task.model), scheduler(task), "CPU", properties)

    def generate(prompts: TokenIds, num_output: int) -> TokenIds:
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [request(task, num_output)] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    write_result(task, measure(task, generate), ["openvino-genai", "openvino"])


def scheduler(task: Task) -> openvino_genai.SchedulerConfig:
    """Limits of a batch, and room in the KV cache for all sequences of a batch and a shared prefix."""
    config = openvino_genai.SchedulerConfig()
    config.max_num_seqs = _MAX_NUM_SEQS
    config.max_num_batched_tokens = _MAX_NUM_BATCHED_TOKENS
    config.cache_size = 4  # GiB
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = task.reuses_prefixes
    return config


def request(task: Task, num_output: int) -> openvino_genai.GenerationConfig:
    """Options of one request."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = num_output
    config.ignore_eos = True
    config.do_sample = task.temperature > 0
    if config.do_sample:
        config.temperature, config.top_p = task.temperature, task.top_p
    config.apply_chat_template = False
    return config


if __name__ == "__main__":
    main()
