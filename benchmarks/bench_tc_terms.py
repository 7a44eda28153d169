"""Time ops.tc_terms, forward and backward, against the eager formula, on the CPU.

pytest benchmarks/bench_tc_terms.py --benchmark-only --benchmark-group-by=group
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, interleaved, record, record_ratios
from movae_fast import ops, reference

SHAPES = [(256, 10), (2048, 10)]
PEERS = ["movae", "movae stratified", "eager", "eager stratified"]


def calls(B: int, D: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    mu, noise, logvar = torch.randn(3, B, D, generator=generator).unbind()
    leaves = [t.requires_grad_() for t in (mu + noise * (logvar / 2 - 1).exp(), mu, logvar - 2)]
    leaves = [t.detach().requires_grad_() for t in leaves]

    def step(terms: Callable[..., tuple[Tensor, Tensor]], estimator: str) -> None:
        log_q_z, log_prod_q_z = terms(*leaves, 50_000, estimator)
        torch.autograd.grad((log_q_z - log_prod_q_z).mean(), leaves)

    return {
        "movae": lambda: step(ops.tc_terms, "mws"),
        "movae stratified": lambda: step(ops.tc_terms, "mss"),
        "eager": lambda: step(reference.tc_terms, "mws"),
        "eager stratified": lambda: step(reference.tc_terms, "mss"),
    }


def exponentials_per_ms() -> float:
    """Return how many exponentials per millisecond torch.exp computes on a buffer that stays in the cache: best
    of ten."""
    x = torch.randn(2**15)
    out = torch.empty_like(x)
    return 2**15 / min(interleaved({"exp": lambda: torch.exp(x, out=out)}, 20)["exp"] for _ in range(10))


@pytest.mark.parametrize(("B", "D"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_tc_terms(benchmark: Any, peer: str, B: int, D: int) -> None:
    benchmark.group = f"tc_terms forward + backward B={B} D={D}"
    bound = "exponentials, B^2 (D + 1) each way, over torch.exp's rate in this run"
    record(benchmark, calls(B, D)[peer], 2 * B * B * (D + 1) / exponentials_per_ms(), bound)


@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_ratios(benchmark: Any, B: int, D: int) -> None:
    """Time all in turn; record the medians, and how many times faster than the eager formula each is."""
    benchmark.group = f"tc_terms ratios B={B} D={D}"
    peers = calls(B, D)
    medians = interleaved(peers, 5)
    record_ratios(benchmark, f"B={B} D={D}", medians, "eager", lambda name: name.replace("movae", "eager"))
    benchmark.pedantic(peers["movae"], rounds=3)
