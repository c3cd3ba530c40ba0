"""The one function that splits n things over k holders."""

from hpcinfer.errors import ConfigError


def split(total: int, parts: int) -> list[range]:
    """Cut [0, total) into `parts` contiguous ranges whose sizes differ by at most one, larger ones first."""
    if parts < 1 or total < 0:
        raise ConfigError(f"cannot split {total} things into {parts} parts", expected="parts >= 1, total >= 0")
    small, num_larger = divmod(total, parts)
    ranges, start = [], 0
    for part in range(parts):
        stop = start + small + (part < num_larger)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def align_up(value: int, multiple: int) -> int:
    """Round `value` up to the next multiple of `multiple`."""
    return -(-value // multiple) * multiple
