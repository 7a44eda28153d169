"""Time the training step of nn.VectorQuantizer against vector-quantize-pytorch's layer, on the CPU.

pytest benchmarks/bench_vector_quantizer.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.measure import Call, allocated_memory, interleaved, record, sgemm_gflops
from movae_fast.nn import ResidualVQ, VectorQuantizer

N = 32768  # 32 feature maps of 32 x 32
SHAPES = [(512, 64), (8192, 64), (1024, 256)]
# Options of the layer, by name; the same for both.
OPTIONS: dict[str, dict[str, Any]] = {
    "rotation": {},
    "straight-through": {"rotation_trick": False},
    "revival": {"threshold_ema_dead_code": 2},
}


def calls(K: int, D: int, options: dict[str, Any]) -> dict[str, Call]:
    """Return, by implementation, a call that runs the layer forward with its codebook update, and backward."""
    vq = pytest.importorskip("vector_quantize_pytorch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, D, 32, 32, generator=generator).requires_grad_()
    upstream = torch.randn(32, D, 32, 32, generator=generator)
    codes = torch.randn(K, D, generator=generator)

    def step(layer: nn.Module) -> Call:
        layer.codebook = codes

        def run() -> None:
            out, _, loss = layer(x)
            torch.autograd.grad((out * upstream).sum() + loss, x)

        return run

    return {
        "movae": step(VectorQuantizer(D, K, accept_image_fmap=True, **options)),
        "vector-quantize-pytorch": step(vq.VectorQuantize(D, K, accept_image_fmap=True, **options)),
    }


@pytest.mark.parametrize(("K", "D"), SHAPES)
@pytest.mark.parametrize("peer", ["movae", "vector-quantize-pytorch"])
def test_vector_quantizer(benchmark: Any, peer: str, K: int, D: int) -> None:
    benchmark.group = f"VectorQuantizer training step N={N} K={K} D={D}"
    bound = "float32 operations of the search over the sgemm rate of this run"
    call = calls(K, D, OPTIONS["rotation"])[peer]
    record(benchmark, call, 2 * N * K * D / sgemm_gflops() / 1e6, bound, rounds=3)


@pytest.mark.parametrize(
    ("options", "K", "D"),
    [*(("rotation", *shape) for shape in SHAPES), ("straight-through", 512, 64), ("revival", 512, 64)],
)
def test_ratios(benchmark: Any, options: str, K: int, D: int) -> None:
    """Time both in turn; record the medians, and how many times faster ours is."""
    benchmark.group = f"VectorQuantizer ratios {options} N={N} K={K} D={D}"
    peers = calls(K, D, OPTIONS[options])
    medians = interleaved(peers, 3)
    ratio = medians["vector-quantize-pytorch"] / medians["movae"]
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["times_faster_than_vector_quantize_pytorch"] = ratio
    benchmark.extra_info["threads"] = torch.get_num_threads()
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items())
    print(f"K={K} D={D} {options:16s} {times}: {ratio:.2f}x")
    benchmark.pedantic(peers["movae"], rounds=3)


RVQ = {"dim": 64, "num_quantizers": 4, "codebook_size": 1024}


def test_residual_ratios(benchmark: Any) -> None:
    """Time forward and backward of four levels of residual VQ in turn; record the ratio of the times, and the
    memory."""
    vq = pytest.importorskip("vector_quantize_pytorch")
    benchmark.group = f"ResidualVQ ratios N={N} {RVQ}"
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(1, N, RVQ["dim"], generator=generator) for _ in range(2))
    x.requires_grad_()
    layers = {"movae": ResidualVQ(**RVQ), "vector-quantize-pytorch": vq.ResidualVQ(**RVQ)}
    layers["movae"].load_state_dict(layers["vector-quantize-pytorch"].state_dict())

    def step(layer: nn.Module) -> Call:
        def run() -> None:
            out, _, loss = layer(x)
            torch.autograd.grad((out * upstream).sum() + loss.sum(), x)

        return run

    peers = {name: step(layer) for name, layer in layers.items()}
    medians = interleaved(peers, 3)
    ratio = medians["vector-quantize-pytorch"] / medians["movae"]
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["times_faster_than_vector_quantize_pytorch"] = ratio
    print(", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()) + f": {ratio:.2f}x")
    benchmark.extra_info["allocated_mib"] = {name: allocated_memory(call) for name, call in peers.items()}
    bound = "float32 operations of the searches over the sgemm rate of this run"
    flops = 2 * RVQ["num_quantizers"] * N * RVQ["codebook_size"] * RVQ["dim"]
    record(benchmark, peers["movae"], flops / sgemm_gflops() / 1e6, bound, rounds=3)
