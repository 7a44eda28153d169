"""Time UPGrad as a whole and in its parts against TorchJD's, on float32 rows, on the CPU.

pytest benchmarks/bench_upgrad.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
import torchjd.aggregation as jd

from benchmarks.measure import Call, extra_memory, interleaved
from movae_fast import ops
from movae_fast.aggregation import UPGrad

SHAPES = [(m, P) for P in (100_000, 1_000_000, 10_000_000) for m in (2, 4)]
PARTS = ["gramian", "combine", "upgrad"]


def calls(part: str, m: int, P: int) -> dict[str, Call]:
    """Return, by implementation, a call of one part of UPGrad (or all of it) on m conflicting rows of P
    numbers."""
    J = torch.randn(m, P, generator=torch.Generator().manual_seed(0))
    J -= 0.9 * J.mean(0)
    weights = torch.rand(m, dtype=torch.float64)
    single = weights.float()
    if part == "gramian":
        return {
            "movae (float64)": lambda: ops.gramian(J),
            "torch (float32)": lambda: J @ J.T,
            "torch (float64)": lambda: J.double() @ J.double().T,
        }
    if part == "combine":
        return {"movae": lambda: ops.combine(J, weights), "torch": lambda: single @ J}
    ours, theirs = UPGrad(), jd.UPGrad()
    return {"movae": lambda: ours(J), "torchjd": lambda: theirs(J)}


def moved(part: str, m: int, P: int) -> int:
    """Return the bytes that the part has to read and write at least, for the bound on its time."""
    return 4 * P * {"gramian": m, "combine": m + 1, "upgrad": 2 * m + 1}[part]


def copy_gigabytes_a_second() -> float:
    source, target = torch.ones(50_000_000), torch.empty(50_000_000)
    milliseconds = min(interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"] for _ in range(3))
    return 2 * 4 * 50e6 / milliseconds / 1e6


@pytest.mark.parametrize(("m", "P"), SHAPES)
@pytest.mark.parametrize("part", PARTS)
def test_ratios(benchmark: Any, part: str, m: int, P: int) -> None:
    """Time all in turn; record the medians, and how many times faster ours is than each other."""
    benchmark.group = f"{part} m={m} P={P}"
    peers = calls(part, m, P)
    ours = next(iter(peers))
    medians = interleaved(peers, 101 if P < 1e6 else 31 if P < 1e7 else 11)
    info = benchmark.extra_info
    info["median_ms"] = medians
    info["times_faster_than"] = {k: v / medians[ours] for k, v in medians.items() if k != ours}
    info["extra_memory_mib"] = {name: extra_memory(call) for name, call in peers.items()}
    info["bound_ms"] = moved(part, m, P) / copy_gigabytes_a_second() / 1e6
    info["bound"] = "bytes over the copy bandwidth of this run; smaller problems lie in the caches"
    info["threads"] = torch.get_num_threads()
    print(
        f"{part} m={m} P={P} bound {info['bound_ms']:.3f}",
        {k: round(v, 3) for k, v in medians.items()},
        end=" ",
    )
    print({k: round(v, 2) for k, v in info["times_faster_than"].items()})
    benchmark.pedantic(peers[ours], rounds=5)
