"""Sizes of a layer that whole halves of it are tested with."""

from typing import NamedTuple

from hpcinfer.kernels.protocol import HeadLayout


class Model(NamedTuple):
    """Sizes of one layer and a head."""

    dtype: str
    cache_dtype: str
    hidden: int = 72
    grain_heads: tuple[int, ...] = (2, 2, 1)
    num_kv_heads: int = 2
    head_size: int = 24
    width: int = 40
    window: int = 0
    has_bias: bool = True

    @property
    def layout(self) -> HeadLayout:
        """Heads in grains."""
        num_heads = sum(self.grain_heads)
        kv_of_head = tuple(head * self.num_kv_heads // max(1, num_heads) for head in range(num_heads))
        return HeadLayout(self.head_size, max(self.grain_heads), self.grain_heads, kv_of_head)
