"""Register the ops with torch: the library, the Triton files, and the refusal of vmap."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.library import triton_op

# Library rather than custom_op: a third of the cost of a call, which is what a small Jacobian pays.
library = torch.library.Library("movae", "FRAGMENT")


def triton_kernels(stem: str) -> Any:
    """Return movae_fast.kernels.<stem>, imported at the first CUDA tensor: Triton is not everywhere."""
    return importlib.import_module(f"movae_fast.kernels.{stem}")


def launching_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as `torch.library.triton_op` does.

    torch would search the function's source for kernels: it imports its compiler for that, 1.3 CPU seconds
    at every start, and finds none, since the launchers are imported later. A partial has no source to search.
    A compiler sees the launches either way, when it traces the function.
    """

    def register(function: Callable[..., Any]) -> Any:
        sourceless: Any = functools.partial(function)
        sourceless.__globals__ = function.__globals__  # where the schema's types are looked up
        return triton_op(name, sourceless, mutates_args=())

    return register


def refuse_vmap(op: str, remedy: str) -> None:
    """Make vmap over `op` a clear error."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"movae::{op} has no vmap rule: {remedy}")

    torch.library.register_vmap(f"movae::{op}", refuse)
