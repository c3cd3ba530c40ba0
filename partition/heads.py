"""Which query heads a grain has, and which KV heads a run of grains needs."""

from hpcinfer.partition.grains import grain_ranges


def query_heads(num_heads: int, grains: int, run: range) -> range:
    """Query heads of a contiguous run of grains."""
    heads = grain_ranges(num_heads, grains)
    return range(heads[run.start].start, heads[run.stop - 1].stop)


def needed_kv_heads(num_heads: int, num_kv_heads: int, heads: range) -> range:
    """KV heads that a run of query heads reads; neighbours that share one both hold it."""
    if not heads:
        return range(0)
    group = num_heads // num_kv_heads
    return range(heads.start // group, (heads.stop - 1) // group + 1)
