"""Time ops.nearest_code against other implementations, for N = 32768 float32 rows on the CPU.

pytest benchmarks/bench_nearest_code.py --benchmark-only --benchmark-group-by=group
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, interleaved, record, record_ratios, sgemm_gflops
from movae_fast import _csrc, ops
from movae_fast.ops.extension import forced_isa

N = 32768
SHAPES = [(512, 64), (8192, 64), (1024, 256)]
CHUNK = 1024


def chunked_products(z: Tensor, codebook: Tensor, buffer: Tensor) -> None:
    """Compute only the matrix products of a chunked search, as a lower bound on its time."""
    for rows in z.split(CHUNK):
        torch.mm(rows, codebook.T, out=buffer)


def chunked_search(z: Tensor, codebook: Tensor, buffer: Tensor) -> Tensor:
    """Search with the fastest plain torch code that was found: one distance buffer of 1024 rows, used again and
    again."""
    half_norm = codebook.square().sum(1) / 2
    return torch.cat(
        [
            torch.addmm(half_norm, rows, codebook.T, alpha=-1, out=buffer[: len(rows)]).min(1).indices
            for rows in z.split(CHUNK)
        ]
    )


def vector_quantize_pytorch(codebook: Tensor) -> Callable[[Tensor], Any]:
    """Return the lookup of vector-quantize-pytorch's layer in evaluation mode, which also gathers the codes."""
    vq = pytest.importorskip("vector_quantize_pytorch")
    layer = vq.VectorQuantize(
        dim=codebook.shape[1], codebook_size=codebook.shape[0], rotation_trick=False
    ).eval()
    layer.codebook = codebook
    return lambda z: layer(z[None])


def calls(K: int, D: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, D, generator=generator)
    codebook = torch.randn(K, D, generator=generator)
    buffer = torch.empty(CHUNK, K)
    layer = vector_quantize_pytorch(codebook)

    def lookup() -> None:
        with torch.no_grad():
            layer(z)

    def ours(isa: str) -> None:
        with forced_isa(isa):
            ops.nearest_code(z, codebook)

    return {
        **{f"movae {isa}": partial(ours, isa) for isa in _csrc.nearest_code_isas()},
        "cdist + argmin": lambda: torch.cdist(z, codebook).argmin(1),
        "chunked addmm + min": lambda: chunked_search(z, codebook, buffer),
        "chunked sgemm alone": lambda: chunked_products(z, codebook, buffer),
        "vector-quantize-pytorch": lookup,
    }


PEERS = [
    *(f"movae {isa}" for isa in _csrc.nearest_code_isas()),
    "cdist + argmin",
    "chunked addmm + min",
    "chunked sgemm alone",
    "vector-quantize-pytorch",
]


@pytest.mark.parametrize(("K", "D"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_nearest_code(benchmark: Any, peer: str, K: int, D: int) -> None:
    benchmark.group = f"nearest_code N={N} K={K} D={D}"
    bound = "float32 operations over the sgemm rate of this run"
    record(benchmark, calls(K, D)[peer], 2 * N * K * D / sgemm_gflops() / 1e6, bound)


@pytest.mark.parametrize(("K", "D"), SHAPES)
def test_ratios(benchmark: Any, K: int, D: int) -> None:
    """Time every implementation in turn; record the medians, and how many times faster than cdist + argmin each
    is."""
    benchmark.group = f"nearest_code ratios N={N} K={K} D={D}"
    peers = calls(K, D)
    medians = interleaved(peers, 7 if K * D < 10**5 else 5)
    record_ratios(benchmark, f"K={K} D={D}", medians, "cdist", lambda _: "cdist + argmin")
    benchmark.pedantic(peers[PEERS[0]], rounds=3)
