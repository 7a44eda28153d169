"""Compile the parts of a step with torch.compile at their first use: whole functions, without graph breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from movae_fast.choices import CompileMode
from movae_fast.own_code import with_own_code

# With inductor's own limits on recomputation, each gate's upstream gradient is kept beside the gradient
# computed from it: a fifth more activations at the step's peak (cnn_vae_28). With these limits it is computed
# twice instead.
MULTIRATE_LIMITS = {
    "realize_reads_threshold": 12,
    "realize_opcount_threshold": 120,
    "realize_acc_reads_threshold": 24,
}


def resolve_mode(mode: CompileMode, device: torch.device) -> str:
    """Return the mode of torch.compile, with "auto" replaced by "default" on CUDA and by "off" on a CPU, where
    compiling convolutions gains little (benchmarks/bench_step.py measures both)."""
    if mode == "auto":
        return "default" if device.type == "cuda" else "off"
    return mode


class Compiled:
    """Wrap a function of tensors, which is compiled as one graph at its first call; with mode "off" it is
    called as it is.

    `torch.autograd.grad` inside the function is traced too, so that the forward pass, every backward pass and
    the operations between them form one region for the compiler. `limits` are further settings of inductor.
    """

    def __init__(
        self, function: Callable[..., Any], mode: str, limits: Mapping[str, int] | None = None
    ) -> None:
        self.name = function.__name__.strip("_").replace("_", " ")
        self.mode, self.pending = mode, mode != "off"
        self.call = function
        if mode != "off":
            # Off by default in torch 2.11; without it the traced function would have to stop at each gradient.
            torch._dynamo.config.trace_autograd_ops = True
            options = {**torch._inductor.list_mode_options(mode), **(limits or {})}
            own = with_own_code(function)
            self.call = torch.compile(own, fullgraph=True, dynamic=False, options=options or None)

    def __call__(self, *args: Any) -> Any:
        self.pending = False
        return self.call(*args)


def graph_counters() -> dict[str, int]:
    """Return the numbers of compiled graphs and of graph breaks in this process so far."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
