"""Time ops.project_weights against TorchJD's projector, both as called from Python, on the CPU.

pytest benchmarks/bench_project_weights.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.linalg import QuadprogProjector

from benchmarks.measure import Call, interleaved
from movae_fast import ops

SIZES = [2, 3, 4, 8, 16, 32, 64]
GRAMIANS = 16


def gramians(m: int) -> list[Tensor]:
    """Return Gramians [m, m]: half of Gaussian rows, and half of rows that all conflict, which need more
    iterations."""
    generator = torch.Generator().manual_seed(m)
    found = []
    for k in range(GRAMIANS):
        J = torch.randn(m, 3 * m, dtype=torch.float64, generator=generator)
        J = J - 0.9 * J.mean(0) if k % 2 else J
        found.append(J @ J.T)
    return found


def calls(m: int) -> dict[str, Call]:
    """Return, by implementation, a call that computes UPGrad's weights from each of the Gramians."""
    given, U = gramians(m), torch.eye(m, dtype=torch.float64) / m
    projector = QuadprogProjector()
    return {
        "movae": lambda: [ops.project_weights(G) for G in given],
        "torchjd": lambda: [projector(U, G).sum(0) for G in given],
    }


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("peer", ["movae", "torchjd"])
def test_project_weights(benchmark: Any, peer: str, m: int) -> None:
    benchmark.group = f"project_weights m={m}, {GRAMIANS} calls"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(calls(m)[peer], rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("m", SIZES)
def test_ratios(benchmark: Any, m: int) -> None:
    """Time both in turn; record the median of a call, and how many times faster than TorchJD's ours is."""
    benchmark.group = f"project_weights ratios m={m}"
    medians = {name: ms / GRAMIANS for name, ms in interleaved(calls(m), 21).items()}
    benchmark.extra_info["median_ms_a_call"] = medians
    benchmark.extra_info["times_faster_than_torchjd"] = medians["torchjd"] / medians["movae"]
    benchmark.extra_info["threads"] = torch.get_num_threads()
    print(f"m={m} " + ", ".join(f"{k} {1e3 * v:.1f} us" for k, v in medians.items()), end=" ")
    print(f"{medians['torchjd'] / medians['movae']:.1f}x")
    benchmark.pedantic(calls(m)["movae"], rounds=3)
