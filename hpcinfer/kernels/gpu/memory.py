"""What is done where a device has no memory left."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def answers_memory(function: Callable[P, T]) -> Callable[P, T]:
    """Let an array function raise MemoryError where there is no memory, after torch has given back what it keeps.

    While a graph is recorded the error stays torch's: a recording cannot be made in pieces."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from None

    return wrapped
