"""Hold the common steps of registering an op with torch: the op library, launchers of Triton kernels, and the
refusal of vmap."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.library import triton_op

# Library instead of custom_op: a call costs a third, which matters for a small Jacobian.
library = torch.library.Library("movae", "FRAGMENT")


def triton_kernels(stem: str) -> Any:
    """Import and return the module movae_fast.kernels.<stem>.

    Called only for CUDA tensors, since Triton is not installed everywhere.
    """
    return importlib.import_module(f"movae_fast.kernels.{stem}")


def launching_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as an op that launches Triton kernels, as
    `torch.library.triton_op` does.

    It hides the function's source from torch, by a partial. torch would search the source for kernels, which
    imports its compiler (1.3 CPU seconds at every start) and finds none here, since the launchers are imported
    later. When a compiler traces the function, it sees the launches in either case.
    """

    def register(function: Callable[..., Any]) -> Any:
        sourceless: Any = functools.partial(function)
        sourceless.__globals__ = function.__globals__  # where the schema's types are looked up
        return triton_op(name, sourceless, mutates_args=())

    return register


def refuse_vmap(op: str, remedy: str) -> None:
    """Register a vmap rule for `op` that raises NotImplementedError with a `remedy`."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"movae::{op} has no vmap rule: {remedy}")

    torch.library.register_vmap(f"movae::{op}", refuse)
