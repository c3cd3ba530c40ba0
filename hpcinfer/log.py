"""Logging for the commands: one handler on stderr, INFO from the root only, warnings from any rank with its name."""

import logging
import sys


class _RankFormatter(logging.Formatter):
    """Warnings say which rank speaks; the root's plain lines do not need it."""

    def __init__(self, who: str) -> None:
        super().__init__("%(message)s")
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return ": ".join(part for part in (record.levelname.lower(), self._who, text) if part)


def start_logging(*, is_root: bool, who: str = "", debug: bool = False) -> None:
    """Send the log of this process to stderr.

    Args:
        is_root: whether INFO is shown too.
        who: put before warnings, as "rank 3/8 on node07".
        debug: whether DEBUG is shown, on every rank.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RankFormatter(who))
    logger = logging.getLogger("hpcinfer")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.INFO if is_root else logging.WARNING)


def show_info() -> None:
    """Show INFO from now on, on the rank that is the root since the first one has died."""
    logger = logging.getLogger("hpcinfer")
    logger.setLevel(min(logger.level, logging.INFO))
