"""Time ops.linear_cross_entropy, forward and backward, against code that holds all logits at once, on the CPU.

pytest benchmarks/bench_text.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Call, interleaved, record, record_ratios, sgemm_gflops
from movae_fast import ops

# Sentences, tokens, words, width: the Yahoo corpus with the network of He et al. 2019; and a small one.
SHAPES = [(32, 80, 20_001, 1024), (16, 40, 5_000, 256)]
PEERS = ["movae", "all logits", "all logits, compiled"]


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(logits, target.flatten(), ignore_index=0, reduction="sum")


def calls(B: int, T: int, V: int, H: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=generator).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) / H**0.5).requires_grad_()
    target = torch.randint(1, V, (B, T), generator=generator)
    compiled = torch.compile(cross_entropy)
    return {
        "movae": lambda: torch.autograd.grad(
            ops.linear_cross_entropy(hidden, weight, target)[0], [hidden, weight]
        ),
        "all logits": lambda: torch.autograd.grad(cross_entropy(hidden, weight, target), [hidden, weight]),
        "all logits, compiled": lambda: torch.autograd.grad(compiled(hidden, weight, target), [hidden, weight]),
    }


@pytest.mark.parametrize(("B", "T", "V", "H"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_linear_cross_entropy(benchmark: Any, peer: str, B: int, T: int, V: int, H: int) -> None:
    benchmark.group = f"linear_cross_entropy forward + backward B={B} T={T} V={V} H={H}"
    bound = "three matrix products of 2 B T V H operations, at sgemm's rate in this run"
    record(benchmark, calls(B, T, V, H)[peer], 6e-6 * B * T * V * H / sgemm_gflops(), bound, rounds=3)


@pytest.mark.parametrize(("B", "T", "V", "H"), SHAPES)
def test_ratios(benchmark: Any, B: int, T: int, V: int, H: int) -> None:
    """Time all in turn; record the medians, and how many times faster each is than the code with all logits."""
    benchmark.group = f"linear_cross_entropy ratios B={B} T={T} V={V} H={H}"
    peers = calls(B, T, V, H)
    medians = interleaved(peers, 5)
    record_ratios(benchmark, f"B={B} T={T} V={V} H={H}", medians, "all-logits", lambda name: "all logits")
    benchmark.pedantic(peers["movae"], rounds=1)
