"""Time AlignedMTL, CAGrad, IMTLG, MGDA and PCGrad against TorchJD's, whole calls on float32 rows, on the CPU.

  OMP_NUM_THREADS=1 pytest benchmarks/bench_aggregators.py --benchmark-only --benchmark-group-by=group

Use one thread: the solver in TorchJD's CAGrad starts threads that spin beside torch's and slow both down.
"""

from typing import Any

import pytest
import torch
import torchjd.aggregation as jd

from benchmarks.measure import interleaved
from movae_fast import aggregation

P = 100_000
OPTIONS: dict[str, dict[str, float]] = {
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "IMTLG": {},
    "MGDA": {},
    "PCGrad": {},
}


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_ratios(benchmark: Any, name: str, m: int) -> None:
    """Time ours and TorchJD's in turn, the whole call and the weights alone; record the medians and the
    ratio."""
    benchmark.group = f"{name} m={m} P={P}"
    J = torch.randn(m, P, generator=torch.Generator().manual_seed(0))
    J -= 0.9 * J.mean(0)
    G = J @ J.T
    ours, theirs = (getattr(package, name)(**OPTIONS[name]) for package in (aggregation, jd))
    calls = {
        "movae": lambda: ours(J),
        "torchjd": lambda: theirs(J),
        "movae, weights": lambda: ours.gramian_weighting(G),
        "torchjd, weights": lambda: theirs.gramian_weighting(G),
    }
    medians = interleaved(calls, 101)
    info = benchmark.extra_info
    info["median_ms"] = medians
    info["times_faster"] = medians["torchjd"] / medians["movae"]
    info["threads"] = torch.get_num_threads()
    print(name, f"m={m}", {k: round(v, 3) for k, v in medians.items()}, round(info["times_faster"], 2))
    benchmark.pedantic(calls["movae"], rounds=5)
