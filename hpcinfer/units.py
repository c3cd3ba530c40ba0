"""Sizes and times as people write them."""

from hpcinfer.errors import ConfigError

_FACTORS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}


def parse_bytes(text: str) -> int:
    """Read a size as 4096, 512MiB or 4G; K, M, G and T are powers of 1024."""
    number = text.strip().rstrip("BIKMGTbikmgt ")
    unit = text.strip()[len(number):].strip().upper()
    try:
        size_bytes = int(float(number) * _FACTORS[unit])
    except (KeyError, ValueError, OverflowError):
        size_bytes = -1
    if size_bytes < 0:
        raise ConfigError(f"size {text!r}", expected="a number and a unit, as 512MiB or 4GiB")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Write a size with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Write a duration as 12.3 s, 4 min 05 s or 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
