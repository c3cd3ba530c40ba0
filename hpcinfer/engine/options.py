"""What a replica is built from besides the store, and what of it can be checked without one."""

from dataclasses import dataclass, field

from hpcinfer.comm.selector import Selector
from hpcinfer.config import EngineOptions, ModelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.report.metrics import Metrics
from hpcinfer.units import parse_bytes


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica is built from besides the store."""

    engine: EngineOptions
    dtype: str  # of weights
    max_model_len: int  # tokens
    seed: int
    cache_dtype: str = "float32"  # of the KV cache
    selector: Selector = field(default_factory=Selector)  # of forms of sums, the same on all ranks
    metrics: Metrics = field(default_factory=Metrics)  # of this rank, whatever replicas it is built into


def check_engine_options(options: EngineOptions) -> None:
    """Check what needs no model. Not collective.

    Raises:
        ConfigError: a limit below 1, or a size that is none.
    """
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}", expected="at least 1")
    if options.micro_batches is not None and options.micro_batches < 1:
        raise ConfigError(f"--micro-batches {options.micro_batches}", expected="at least 1")
    if options.kv_cache_memory is not None:
        parse_bytes(options.kv_cache_memory)


def resolve_max_model_len(config: ModelConfig, wanted: int | None) -> int:
    """Resolve the tokens that prompt and output may have together.

    Raises:
        ConfigError: more than the model was made for.
    """
    if wanted is None:
        return config.max_position_embeddings
    if not 1 <= wanted <= config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {wanted}",
            expected=f"from 1 to {config.max_position_embeddings} (max_position_embeddings of the model)",
        )
    return wanted
