"""Another name of `hpcinfer.agree.on_all`."""

from hpcinfer.agree import on_all as together

__all__ = ["together"]
