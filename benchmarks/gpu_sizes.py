"""How large the parts of the GPU benchmark are: for a GPU, and as a toy for Triton's interpreter."""

from typing import NamedTuple

from random_model import Shape

LLAMA_8B = "Llama-3-8B"
ONE_B = "1.1B"


class DecodeSizes(NamedTuple):
    """Generations whose steps are all of one token for each sequence."""

    batches: tuple[int, ...]  # of the first precision
    few: tuple[int, ...]  # batches of the other precisions, and of ways that are compared
    prompt_tokens: int
    output_tokens: int
    profiled: tuple[int, ...]  # batches whose kernels are looked at


class PrefillSizes(NamedTuple):
    """Prompts with one output token each."""

    lengths: tuple[int, ...]
    total_tokens: int  # of all prompts of one length
    batched_tokens: int  # of a step


class BulkSizes(NamedTuple):
    """A job's worth of prompts, all of one length."""

    prompts: int
    peer_prompts: int  # of these, for transformers, whose batches all take alike
    prompt_tokens: int
    output_tokens: int
    max_num_seqs: int
    batched_tokens: int  # of a step
    peer_batches: tuple[int, ...]  # from which transformers takes its best


class CheckSizes(NamedTuple):
    """Generations that are compared with transformers', and with each other."""

    prompts: int
    lengths: tuple[int, int]  # of prompts, both included
    output_tokens: int
    shape: str  # of the random model
    grains: int  # of its store
    has_demo_model: bool


class Sizes(NamedTuple):
    """All of it."""

    shapes: dict[str, Shape]  # the first is the one with targets
    check: CheckSizes
    decode: DecodeSizes
    prefill: PrefillSizes
    bulk: BulkSizes
    loading_shape: str
    memory_bytes: int  # that are read for the rate of memory
    products: tuple[tuple[int, int, int], ...]  # rows, columns, inputs
    measured_s: float  # of each candidate of a roofline


FULL = Sizes(
    shapes={
        LLAMA_8B: Shape(4096, 32, 32, 8, 14336, 128256),
        ONE_B: Shape(2048, 22, 32, 4, 5632, 32000),  # TinyLlama's
    },
    check=CheckSizes(64, (8, 200), 32, "M1", 8, has_demo_model=True),
    decode=DecodeSizes((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 64, 256), 128, 64, (1, 64)),
    prefill=PrefillSizes((512, 2048, 8192), 16384, 8192),
    bulk=BulkSizes(1024, 512, 512, 128, 256, 4096, (64, 128, 256)),
    loading_shape=ONE_B,
    memory_bytes=4 << 30,
    products=((4096, 4096, 4096), (8192, 8192, 8192), (8192, 28672, 4096)),
    measured_s=0.5,
)
_TOY = Shape(32, 1, 2, 1, 64, 300)
TOY = Sizes(
    shapes={"toy": _TOY},
    check=CheckSizes(6, (3, 6), 2, "tiny", 2, has_demo_model=False),  # few prompts may have no clear token
    decode=DecodeSizes((1,), (1,), 2, 5, (1,)),
    prefill=PrefillSizes((4,), 8, 8),
    bulk=BulkSizes(3, 2, 3, 2, 3, 16, (1, 2)),
    loading_shape="toy",
    memory_bytes=1 << 20,
    products=((64, 64, 64),),
    measured_s=0.01,
)
