"""Frozen configuration that everybody may use: the model's shape, sampling, and the options of a job.

Each option exists once: its name, type, default and help are the dataclass field, and the command line
is derived from it (`hpcinfer.cli`). Nothing here reads files.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hpcinfer.errors import RequestError


def option(default: Any, help: str, *flags: str, metavar: str | None = None, choices: tuple[str, ...] = (),
           parse: Callable[[str], Any] | None = None, both: bool = False) -> Any:
    """Declare a dataclass field that is also a command-line option; a default of () makes it repeatable.

    A default of True makes it a flag that begins with `no`, and its help says what happens then; with `both` there is
    the flag without `no`, too, and the help is of that."""
    metadata = {"help": help, "flags": flags, "metavar": metavar, "choices": choices, "parse": parse, "both": both}
    return field(default=default, metadata=metadata)


def parse_logit_bias(text: str) -> tuple[int, float]:
    """Read ID=BIAS."""
    token_id, equals, bias = text.partition("=")
    if not equals or not token_id.isdigit():
        raise ValueError("expected ID=BIAS, as 42=-1.5")
    return int(token_id), float(bias)


def parse_seed(text: str) -> int:
    """Read a seed of 64 bits."""
    seed = int(text)
    if not is_64_bit(seed):
        raise ValueError("expected a 64-bit integer")
    return seed


def parse_duration(text: str) -> float:
    """Read a time as 5400 (seconds), 90:00, 1:30:00 or 1-06:00:00."""
    match = re.fullmatch(r"(?:([0-9]+)-(?=[^:]+:[^:]+:))?(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+)", text)
    if not match:
        raise ValueError("expected seconds, or a time as 1:30:00")
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def is_64_bit(value: int) -> bool:
    """Whether a signed 64-bit integer holds the value."""
    return -(2**63) <= value < 2**63


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (`rope_type` default means not at all)."""

    rope_type: str = "default"  # default, linear, llama3 or yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it (resolved when the model is read)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one decoder-only model; what differs between families, as data."""

    architecture: str  # Hugging Face's name, as LlamaForCausalLM
    hidden_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int
    head_size: int
    intermediate_size: int  # MLP width
    vocab_size: int
    max_position_embeddings: int  # tokens
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head, before rotary
    windows: tuple[int, ...] = ()  # per layer: keys that a token sees, itself included; 0 is all
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # of config.json and generation_config.json together

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`."""
        tuples = {name: tuple(values[name]) for name in ("windows", "eos_token_ids")}
        return ModelConfig(**{**values, **tuples, "rope_scaling": RopeScaling(**values["rope_scaling"])})


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; the same names in the input, in generation_config.json and on the command line."""

    temperature: float = option(1.0, "divide logits by this; 0 takes the most likely token")
    top_p: float = option(1.0, "sample from the smallest set of tokens with at least this probability")
    top_k: int = option(0, "sample from this many most likely tokens; 0 or -1 is all")
    min_p: float = option(0.0, "drop tokens less likely than this fraction of the most likely one")
    repetition_penalty: float = option(1.0, "divide positive, multiply negative logits of tokens seen before")
    presence_penalty: float = option(0.0, "subtract this from logits of tokens in the output")
    frequency_penalty: float = option(0.0, "subtract this times the count from logits of tokens in the output")
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "add BIAS to the logit of token ID; repeatable", metavar="ID=BIAS", parse=parse_logit_bias
    )  # ascending ids
    max_tokens: int = option(256, "output tokens at most")
    min_tokens: int = option(0, "output tokens before an end-of-sequence or stop token is allowed")
    stop: tuple[str, ...] = option((), "string that ends the output and is not part of it; repeatable")
    stop_token_ids: tuple[int, ...] = option((), "token id that ends the output; repeatable", metavar="ID", parse=int)
    ignore_eos: bool = option(False, "go on after an end-of-sequence token")
    n: int = option(1, "completions per prompt")
    logprobs: int | None = option(None, "report log-probabilities: of the sampled token and of the N most likely ones")
    echo: bool = option(False, "put the prompt before the text, and its log-probabilities with --logprobs")
    seed: int | None = None  # of this request; the job's seed if None

    @property
    def is_greedy(self) -> bool:
        """No randomness: the most likely token each time."""
        return self.temperature == 0.0

    @property
    def scores_prompt(self) -> bool:
        """Log-probabilities of the prompt's own tokens are asked for (echo with logprobs)."""
        return self.echo and self.logprobs is not None

    @property
    def needs_seen_ids(self) -> bool:
        """Whether the logits behind a token depend on which tokens came before it, besides by the model."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def adjusts_logits(self, num_output: int) -> bool:
        """Whether the logits behind so many output tokens are changed before a token is chosen."""
        return bool(self.logit_bias or self.needs_seen_ids or num_output < self.min_tokens)

    def validate(self) -> None:
        """Check ranges.

        Raises:
            RequestError: a value outside its range, naming it.
        """
        for name, is_valid, expected in _sampling_rules(self):
            if not is_valid:
                raise RequestError("invalid_value", f"{name}={getattr(self, name)!r}: expected {expected}", param=name)


MAX_LOGPROBS = 20  # most likely tokens reported per position, at most
MAX_CHOICES = 128  # completions per prompt, at most
MAX_BIAS = 100  # added to or subtracted from a logit, at most


def _sampling_rules(params: SamplingParams) -> list[tuple[str, bool, str]]:
    penalties = [(name, -2.0 <= getattr(params, name) <= 2.0, "a number from -2 to 2")
                 for name in ("presence_penalty", "frequency_penalty")]
    return penalties + [
        ("temperature", 0.0 <= params.temperature < float("inf"), "a number of at least 0"),
        ("top_p", 0.0 < params.top_p <= 1.0, "a number above 0, at most 1"),
        ("top_k", params.top_k >= -1, "an integer of at least -1"),
        ("min_p", 0.0 <= params.min_p <= 1.0, "a number from 0 to 1"),
        ("repetition_penalty", 0.0 < params.repetition_penalty < float("inf"), "a number above 0"),
        ("logit_bias", all(token_id >= 0 and -MAX_BIAS <= bias <= MAX_BIAS for token_id, bias in params.logit_bias),
         f"ids of at least 0, each with a number from -{MAX_BIAS} to {MAX_BIAS}"),
        ("stop", "" not in params.stop, "strings that are not empty"),
        ("stop_token_ids", min(params.stop_token_ids, default=0) >= 0, "ids of at least 0"),
        ("max_tokens", params.max_tokens >= (0 if params.echo else 1), "at least 1 (0 with echo)"),
        ("min_tokens", 0 <= params.min_tokens <= max(params.max_tokens, 0), "from 0 to max_tokens"),
        ("n", 1 <= params.n <= MAX_CHOICES, f"from 1 to {MAX_CHOICES}"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        ("seed", params.seed is None or is_64_bit(params.seed), "a 64-bit integer"),
    ]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and in which precision."""

    model: str = option("", "store, Hugging Face folder, hub-cache snapshot, or hub name that is there locally",
                        metavar="PATH")
    dtype: str = option("auto", "weights (unquantised ones) and KV cache are rounded to this; sums are always float32;"
                        " auto is float32 on CPUs, bfloat16 on GPUs",
                        choices=("auto", "float32", "bfloat16", "float16"))
    kv_cache_dtype: str = option("auto", "precision of the KV cache; auto is that of --dtype; fp8 on GPUs alone",
                                 choices=("auto", "float32", "bfloat16", "float16", "int8", "fp8"))
    device: str = option("auto", "where arrays live: cpu, or cuda, a GPU for each rank (not measured yet); auto is cpu",
                         choices=("auto", "cpu", "cuda"))
    reproducible: bool = option(True, "on GPUs: bits that depend on neither batch nor mesh; without, products and sums"
                                " are the libraries', which may be faster. On CPUs it is always so", both=True)
    cuda_graphs: bool = option(True, "launch every kernel of a decode step by itself, instead of recorded steps")
    ranks_per_gpu: int = option(1, "ranks that share a GPU, through the MPI: to try tp and pp where there is one GPU")
    kernels: str = option("auto", "array functions: native (C), or reference (torch); auto takes native where it was"
                          " built", choices=("auto", "native", "reference"))
    max_model_len: int | None = option(None, "tokens of prompt and output together; the model's own limit if not given")
    cache_dir: str | None = option(None, "where a Hugging Face folder is converted to ($HPCINFER_CACHE if not given)",
                                   metavar="DIR")
    stage: str | None = option(None, "folder on each node's own disk that keeps copies of the weights that are read,"
                               " for restarted steps and the next job on the node", metavar="DIR")


@dataclass(frozen=True)
class MeshOptions:
    """How ranks are laid out."""

    tensor_parallel_size: int = option(1, "ranks that share each layer", "-tp")
    pipeline_parallel_size: int = option(1, "stages that share the layers", "-pp")
    data_parallel_size: int | None = option(None, "replicas; the rest of the world if not given", "-dp")


@dataclass(frozen=True)
class JobMeshOptions(MeshOptions):
    """How the ranks of a job are laid out, which may lose some."""

    spare_ranks: int = option(0, "ranks that wait to take the place of dead ones, where the MPI lets the others go on")


@dataclass(frozen=True)
class EngineOptions:
    """Limits of the scheduler and the KV cache; none of them changes a result."""

    max_num_seqs: int = option(64, "sequences in one batch at most")
    max_num_batched_tokens: int = option(512, "tokens in one batch at most; longer prompts are prefilled in chunks")
    micro_batches: int | None = option(
        None, "batches in flight in a pipeline; as many as stages if not given, one more hides slow links between them",
        metavar="N"
    )
    block_size: int = option(16, "tokens per KV block")
    kv_cache_memory: str | None = option(
        None, "KV cache per rank, as 512MiB or 4GiB; a share of free memory if not given", metavar="SIZE"
    )
    prefix_reuse: bool = option(
        True, "compute every prompt from its first token, also if the KV cache has its beginning"
    )
    collectives: str = option(
        "auto", "form of the sums over tp ranks; auto takes what `hpcinfer calibrate` found to be the fastest for each"
        " size, or an estimate", choices=("auto", "one_shot", "two_shot", "leader", "node_one_shot", "node_two_shot",
                                          "switch_one_shot", "switch_two_shot")
    )
    overlap_sums: str = option(
        "auto", "sums of one half of a batch behind the products of the other; auto: between nodes, where they take"
        " long", choices=("auto", "always", "never")
    )
    threads: int | None = option(
        None, "threads per rank; what the launcher gives a rank ($OMP_NUM_THREADS, $SLURM_CPUS_PER_TASK), else 1"
    )
    debug_lockstep: bool = option(False, "compare a digest of the schedule across each replica every step")


@dataclass(frozen=True)
class JobOptions:
    """What is read and written."""

    input: str = option("", "prompts: JSONL (OpenAI batch, prompt or messages) or text, a prompt per line; .gz too",
                        metavar="FILE")
    input_format: str = option("auto", "format of the input; auto looks at its name and at its first row",
                               choices=("auto", "jsonl", "text"))
    output: str = option("", "completions, JSONL in input order; FILE.job/ beside it holds the job", metavar="FILE")
    seed: int = option(0, "seed of the whole job", metavar="N", parse=parse_seed)
    template_date: str | None = option(
        None, "date that chat templates see, as 2026-01-31; pinned at the first start if not given", metavar="DATE"
    )
    retry_errors: bool = option(False, "compute rows again that ended in error records")
    refill: str = option("auto", "where a rank takes weights after a death, beyond its own memory: the store, ranks of"
                         " other replicas (sister), or what is faster (auto)", choices=("auto", "sister", "store"))
    fail_on_error: bool = option(False, "exit with 1 if any row ended in an error record")
    lease_timeout: float = option(180.0, "seconds without a sign of life after which another job's work is taken over")
    hang_timeout: float = option(
        600.0, "seconds without progress after which a rank is treated as dead, twice that where nobody waits for it;"
        " 0 is never"
    )
    time_limit: float | None = option(
        None, "stop in time for this end, from the start of the process; the allocation's own end, where Slurm says"
        " one, counts too", metavar="SECONDS|HH:MM:SS", parse=parse_duration
    )
    stop_margin: float = option(
        60.0, "seconds before the end of the time in which work is put away; a tenth of the time at most"
    )
    merge: bool = option(True, "leave the output to `hpcinfer merge`")
    trace: bool = option(False, "write FILE.job/trace.json, which Perfetto and Chrome's tracing show: a row per rank")
    requeue: bool = option(False, "when stopped by a signal or the time limit, have Slurm start the same job again")


@dataclass(frozen=True)
class SuperviseOptions:
    """How the steps of a supervised job are started, and started again."""

    launcher: str = option("auto", "what starts the steps; auto is srun in a Slurm allocation, where it can start our"
                           " MPI, else mpiexec", choices=("auto", "mpiexec", "srun"))
    nodes: str | None = option(None, "hosts for the steps; those of the allocation if not given, without one this one",
                               metavar="HOST[:RANKS],...")
    ranks_per_node: int | None = option(None, "ranks on each node; what was asked of Slurm if not given, else 1")
    restarts: int = option(10, "times that a replica starts again in a row without a finished row in between")
    backoff: float = option(1.0, "seconds before the first of them; doubled each time, at most 60")
    grace: float = option(25.0, "seconds in which steps put their work away when the supervisor is stopped")
    give_back: bool = option(False, "give nodes that have no work towards the end back to Slurm")


@dataclass(frozen=True)
class RunOptions:
    """All options of a run."""

    model: ModelOptions
    mesh: JobMeshOptions
    engine: EngineOptions
    job: JobOptions
    sampling: dict[str, Any]  # what the command line says, by field of SamplingParams

    def flat(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}
