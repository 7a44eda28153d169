"""Time ops.quantize, forward and backward, against plain torch and vector-quantize-pytorch's layer, on the CPU.

pytest benchmarks/bench_quantize.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, interleaved, record, record_ratios, sgemm_gflops
from movae_fast import ops, reference

N = 32768
SHAPES = [(512, 64), (8192, 64), (1024, 256)]
PEERS = ["movae", "movae channel-first", "torch reference", "vector-quantize-pytorch"]


def calls(K: int, D: int) -> dict[str, Call]:
    """Return, by implementation, a VQ layer's part of a training step.

    It is the forward, the EMA statistics, and the gradients of z_q and of the commitment loss.
    """
    vq = pytest.importorskip("vector_quantize_pytorch")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, D, generator=generator).requires_grad_()
    image = torch.randn(32, D, 32, 32, generator=generator).requires_grad_()
    codebook = torch.randn(K, D, generator=generator)
    layer = vq.VectorQuantize(dim=D, codebook_size=K, rotation_trick=False)
    layer.codebook = codebook

    def ours(z: Tensor) -> None:
        z_q, _, sq_err, _, _ = ops.quantize(z, codebook)
        torch.autograd.grad(z_q.sum() + sq_err.mean(), z)

    def torch_reference() -> None:
        z_q, _, sq_err, _, _ = reference.quantize(z, codebook)
        torch.autograd.grad(reference.straight_through(z, z_q).sum() + sq_err.mean(), z)

    def published() -> None:
        z_q, _, loss = layer(z[None])
        torch.autograd.grad(z_q.sum() + loss.sum(), z)

    return {
        "movae": lambda: ours(z),
        "movae channel-first": lambda: ours(image),
        "torch reference": torch_reference,
        "vector-quantize-pytorch": published,
    }


@pytest.mark.parametrize(("K", "D"), SHAPES)
@pytest.mark.parametrize("peer", PEERS)
def test_quantize(benchmark: Any, peer: str, K: int, D: int) -> None:
    benchmark.group = f"quantize N={N} K={K} D={D}"
    bound = "float32 operations of the search over the sgemm rate of this run"
    record(benchmark, calls(K, D)[peer], 2 * N * K * D / sgemm_gflops() / 1e6, bound)


@pytest.mark.parametrize(("K", "D"), SHAPES)
def test_ratios(benchmark: Any, K: int, D: int) -> None:
    """Time all in turn; record the medians, and how many times faster than vector-quantize-pytorch each is."""
    benchmark.group = f"quantize ratios N={N} K={K} D={D}"
    peers = calls(K, D)
    medians = interleaved(peers, 5)
    peer = "vector-quantize-pytorch"
    record_ratios(benchmark, f"K={K} D={D}", medians, peer, lambda _: peer)
    benchmark.pedantic(peers["movae"], rounds=3)
