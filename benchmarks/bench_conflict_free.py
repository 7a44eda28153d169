"""Measure the time of a conflict-free step relative to a step on the summed loss.

The variants are strict UPGrad, UPGrad with cheaper Gramians, and projection of the whole step.

  pytest benchmarks/bench_conflict_free.py --benchmark-only -s

It does without torch.compile, and so takes minutes only; bench_step.py measures compiled steps. On a GPU each
step is one CUDA graph, and both implementations of the projection are timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.bench_step import DEVICE, network, torchjd_loop
from benchmarks.measure import Call, interleaved
from movae_fast import ops
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.aggregation.weightings import Sum
from movae_fast.ops import extension
from movae_fast.ops import rows as shared
from movae_fast.training.cuda_graph import CudaGraphs
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import TrainStep

BATCH = 128
ON_GPU = DEVICE.type == "cuda"
STRICT = {"norm_eps": 0.0, "reg_eps": 1e-6, "regularizer": "diagonal"}
# Name -> (aggregator, metric of the step's projection, options of TrainStep).
VARIANTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sum": ("sum", None, {}),
    "strict UPGrad": ("upgrad", None, {}),
    "strict UPGrad, gramian_at features": ("upgrad", None, {"gramian_at": "features"}),
    "strict UPGrad, gramian_at last:2": ("upgrad", None, {"gramian_at": "last:2"}),
    "strict UPGrad, step projected": ("upgrad", "identity", {}),
    "strict UPGrad, step projected in Adam's metric": ("upgrad", "optimizer", {}),
    "sum, step projected in Adam's metric": ("sum", "optimizer", {}),
}


def graph(arch: str, agg: str, metric: Any, precision: Any, options: dict[str, Any]) -> tuple[Call, TrainStep]:
    """Return a call that runs one training step on a fixed batch, and its TrainStep.

    On a GPU the step is recorded as a CUDA graph after the first few calls. metric: the step's metric for the
    projection, None for a step that is not projected.
    """
    model, losses, optimizer = network(arch, 32)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    aggregator: Any = None
    if agg == "sum":
        aggregator = None if metric is None else Sum()
    else:
        aggregator = make_aggregator(agg, len(losses.active)).to(DEVICE)
    options = options | {"precision": Precision(precision, DEVICE), "step_metric": metric}
    options |= {"recorder": CudaGraphs(DEVICE) if ON_GPU else None}
    step = TrainStep(model, losses, aggregator, optimizer, **options)
    x = torch.rand(BATCH, 3, 32, 32, device=DEVICE)
    return lambda: step(x, 0, model.draw_noise(BATCH)), step


@pytest.mark.parametrize("precision", ["fp32", "bf16"] if ON_GPU else ["fp32"])
@pytest.mark.parametrize("arch", ["vae", "vq_vae", "betatc_vae"])
def test_steps(benchmark: Any, arch: str, precision: str) -> None:
    made = {
        name: graph(arch, agg, metric, precision, options) for name, (agg, metric, options) in VARIANTS.items()
    }
    calls = {name: call for name, (call, _) in made.items()}
    if precision == "fp32":
        calls["TorchJD mtl_backward, eager"] = torchjd_loop(
            arch, 32, torch.rand(BATCH, 3, 32, 32, device=DEVICE)
        )
    medians = interleaved(calls, 40 if ON_GPU else 7 if arch == "vq_vae" else 25)
    assert all(step.recorded for _, step in made.values()) or not ON_GPU
    how = "one CUDA graph per step" if ON_GPU else "eager"
    benchmark.group = f"step without conflict: {arch} 32x32 batch {BATCH} {precision}, {how}"
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["over_the_sum"] = {name: ms / medians["sum"] for name, ms in medians.items()}
    for name, ms in medians.items():
        print(f"{arch} {precision} {name:40s} {ms:8.3f} ms {ms / medians['sum']:6.2f}x the sum's", flush=True)
    benchmark.pedantic(calls["strict UPGrad"], rounds=5)


def replayed(call: Call) -> Call:
    """Return a call that replays 20 calls as one CUDA graph, to time the device without the host's launches."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for _ in range(20):
            call()
    return recorded.replay


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA")
@pytest.mark.parametrize("m", [2, 3, 4, 8, 16, 64])
def test_projection(benchmark: Any, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(m, 1 << 20, device=DEVICE)
    rows -= 0.9 * rows.mean(0)
    gramian = ops.gramian(rows)
    paths = ["triton"] if extension.cuda_missing() else ["triton", "cuda"]
    calls: dict[str, Call] = {"gramian of 2^20 columns": replayed(lambda: ops.gramian(rows))}
    for path in paths:
        monkeypatch.setattr(shared, "cuda_path", path)
        calls[f"project_weights, {path}"] = replayed(lambda: ops.project_weights(gramian, **STRICT))
        calls[f"upgrad_weights of 2^20 columns, {path}"] = replayed(lambda: ops.upgrad_weights(rows, **STRICT))
    weights, out = torch.rand(m, dtype=torch.float64, device=DEVICE), torch.empty(1 << 20, device=DEVICE)
    calls["combine of 2^20 columns"] = replayed(lambda: ops.combine(rows, weights, out=out))
    microseconds = {name: 1e3 * ms / 20 for name, ms in interleaved(calls, 20).items()}
    benchmark.group = f"projection on a GPU, m={m}"
    benchmark.extra_info["microseconds_per_call"] = microseconds
    print(f"m={m} " + ", ".join(f"{name} {us:.1f} us" for name, us in microseconds.items()), flush=True)
    benchmark.pedantic(calls[f"project_weights, {paths[0]}"], rounds=3)
