"""Copy functions so that torch.compile counts its recompilations separately for each copy: `with_own_code`."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_numbers = itertools.count()


def with_own_code(function: F) -> F:
    """Return a copy of a function or bound method with a code object of its own, to be compiled separately.

    torch.compile keeps its graphs by code object and gives up after a few recompilations of one (eight in torch
    2.11; with fullgraph=True this is an error). With a copy each, two models in one process that compile the
    same method do not use up each other's recompilations.
    """
    inner = getattr(function, "__func__", function)
    assert isinstance(inner, types.FunctionType)
    code = inner.__code__.replace(co_name=f"{inner.__code__.co_name}_{next(_numbers)}")
    copy = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    if inner is function:
        return copy  # type: ignore[return-value]
    return types.MethodType(copy, function.__self__)  # type: ignore[return-value, attr-defined]
