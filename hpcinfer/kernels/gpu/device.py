"""Which GPU is a rank's."""

import torch

from hpcinfer.errors import ConfigError

_HINT = "or --device cpu"


def own_device(local_rank: int, local_size: int) -> torch.device:
    """Find the GPU of a rank, by its number among the ranks of its node, and make it the current one. Not collective.

    A rank that sees a single GPU takes it: the launcher has dealt them out.

    Raises:
        ConfigError: a torch without CUDA, no GPU, or fewer GPUs than ranks.
    """
    if torch.version.cuda is None:
        raise ConfigError(f"torch {torch.__version__}, built without CUDA", expected="one with CUDA, for --device cuda",
                          hint=f"install torch for this machine's CUDA, {_HINT}")  # fmt: skip
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError("no GPU that this process may use", expected="one for each rank, for --device cuda",
                          hint=f"`nvidia-smi` and $CUDA_VISIBLE_DEVICES say what is there, {_HINT}")  # fmt: skip
    if 1 < count < local_size:
        raise ConfigError(f"{local_size} ranks on a node, {count} GPUs", expected="a GPU for each rank",
                          hint=f"start {count} ranks on each node, {_HINT}")  # fmt: skip
    index = 0 if count == 1 else local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
