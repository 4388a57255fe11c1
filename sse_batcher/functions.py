"""Functions that the app registers: checks them, and describes their answers in error messages.

Pure.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .errors import InvalidFunctionError


def check_function(name: str, function: object) -> None:
    """Raise `InvalidFunctionError` unless this can be called and is not async. `name`: what it is registered as."""
    if not callable(function):
        raise InvalidFunctionError(f"{name} must be a function, not {function!r}")
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    # `__call__` is for an instance of a class that has this method.
    if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in (inner, inner.__call__)):
        raise InvalidFunctionError(
            f"{name} must not be async, as {function!r} is: it is called without an event loop. Write it with def, or "
            f"wrap it in asgiref.sync.async_to_sync()"
        )


def described(answer: object) -> str:
    """Describe an answer for an error message by its type, since the value may be long or secret."""
    if inspect.iscoroutine(answer):
        answer.close()  # otherwise Python warns that it was never awaited
        return "a coroutine"
    return repr(answer) if answer is None or isinstance(answer, bool) else f"an object of type {type(answer).__name__}"
