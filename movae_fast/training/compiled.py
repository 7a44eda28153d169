"""torch.compile for the step's regions: whole functions, without graph breaks, compiled when first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

CompileMode = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]


def resolve_mode(mode: CompileMode, device: torch.device) -> str:
    """What `auto` means: compiled on CUDA; eager on a CPU, where convolutions leave the compiler little.

    benchmarks/bench_step.py measures both.
    """
    if mode == "auto":
        return "default" if device.type == "cuda" else "off"
    return mode


class Compiled:
    """A function of tensors, compiled as one graph at its first call (`mode` "off": called as it is).

    Gradients are taken inside: `torch.autograd.grad` is traced into the graph, so that forward, every backward
    and what lies between them are one region for the compiler.
    """

    def __init__(self, function: Callable[..., Any], mode: str) -> None:
        self.name = function.__name__.strip("_").replace("_", " ")
        self.mode, self.pending = mode, mode != "off"
        self.call = function
        if mode != "off":
            # Off by default in torch 2.11; without it the traced function would have to stop at each gradient.
            torch._dynamo.config.trace_autograd_ops = True
            options: dict[str, Any] = {} if mode == "default" else {"mode": mode}
            self.call = torch.compile(function, fullgraph=True, dynamic=False, **options)

    def __call__(self, *args: Any) -> Any:
        self.pending = False
        return self.call(*args)


def graph_counters() -> dict[str, int]:
    """Graphs compiled and graph breaks met so far in this process."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
