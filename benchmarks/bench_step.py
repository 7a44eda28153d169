"""Time a conflict-free training step against a plain one, and against training loops with TorchJD.

  pytest benchmarks/bench_step.py --benchmark-only -s

Every test runs its variants in turn in one process, and records medians and ratios.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad, mtl_backward

from benchmarks.measure import Call, extra_memory, in_process, interleaved, steps_on
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.jacobian import backward
from movae_fast.models import MODELS, VAE, build_model
from movae_fast.objectives import LossVector, resolve_weights
from movae_fast.ops.extension import keep_freed_memory
from movae_fast.training.cuda_graph import WARM, CudaGraphs
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(32, 128), (64, 64)]
ARCHS = ["vae", "vq_vae", "betatc_vae"]
# Name -> (aggregator, precision, options of TrainStep).
OURS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sum eager": ("sum", "fp32", {}),
    "sum compiled": ("sum", "fp32", {"compile_mode": "default"}),
    "upgrad eager": ("upgrad", "fp32", {}),
    "upgrad compiled": ("upgrad", "fp32", {"compile_mode": "default"}),
    "upgrad, all parameters, compiled": ("upgrad", "fp32", {"compile_mode": "default", "jacobian": "all"}),
    "upgrad, gramian_every 4, compiled": ("upgrad", "fp32", {"compile_mode": "default", "gramian_every": 4}),
    "upgrad, gramian_batch 0.125": ("upgrad", "fp32", {"gramian_batch": 0.125}),
    "upgrad eager bf16": ("upgrad", "bf16", {}),
    "upgrad compiled bf16": ("upgrad", "bf16", {"compile_mode": "default"}),
}
GRAPH = {"compile_mode": "default", "captured": True}
if DEVICE.type == "cuda":
    SIZES.append((32, 1024))
    OURS |= {
        f"{agg}, one CUDA graph, {precision}": (agg, precision, GRAPH)
        for precision in ("fp32", "bf16")
        for agg in ("sum", "upgrad")
    }
COLUMNS = {  # name of a ratio -> the variant that it is relative to
    "over sum eager": "sum eager",
    "over sum compiled": "sum compiled",
    "over sum's graph": "sum, one CUDA graph, fp32",
    "over sum's graph, bf16": "sum, one CUDA graph, bf16",
    "TorchJD over it": "TorchJD mtl_backward eager",
}


def network(arch: str, size: int) -> tuple[VAE, LossVector, torch.optim.Optimizer]:
    torch.manual_seed(0)
    shape = (3, size, size)
    model = build_model(arch, shape, "tanh", {}).to(DEVICE)
    weights = resolve_weights(MODELS[arch], shape, None)
    losses = LossVector(model, weights, "gaussian", "sum" if arch == "betatc_vae" else "mean", n_data=50_000)
    return model, losses, torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)


def ours(arch: str, size: int, x: Tensor, agg: str, precision: Any, options: dict[str, Any]) -> Call:
    model, losses, optimizer = network(arch, size)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    aggregator = None if agg == "sum" else make_aggregator(agg, len(losses.active)).to(DEVICE)
    options = dict(options)
    recorder = CudaGraphs(DEVICE) if options.pop("captured", False) else None
    options |= {"precision": Precision(precision, DEVICE), "recorder": recorder}
    step = TrainStep(model, losses, aggregator, optimizer, **options)
    run = steps_on(x, step)

    # A call runs `gramian_every` steps, so that exactly one of them computes the Gramian.
    return repeated(run, options.get("gramian_every", 1))


def repeated(run: Call, times: int) -> Call:
    return run if times == 1 else lambda: [run() for _ in range(times)]


def torchjd_loop(arch: str, size: int, x: Tensor) -> Call:
    """Return a call that runs one eager step of TorchJD's documented loop: mtl_backward, jac_to_grad,
    optimizer."""
    model, losses, _ = network(arch, size)
    # Not fused: on CUDA that refuses gradients whose strides are not the parameter's, as cuDNN leaves them.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    task, shared, aggregator = model.task_parameters(), model.shared_parameters(), UPGrad()

    def run() -> None:
        optimizer.zero_grad()
        features = model.encode(x)
        values = losses(model.forward_features(features), x)
        mtl_backward(
            [v * w for v, w in zip(values, losses.weights_at(1000), strict=True)],
            features=list(features),
            tasks_params=[task.get(name, []) for name in model.objectives],
            shared_params=shared,
            retain_graph=True,
            parallel_chunk_size=1,
        )
        jac_to_grad(shared, aggregator)
        optimizer.step()

    return run


def grad_loop(arch: str, size: int, x: Tensor) -> Call:
    """Return a call that runs one eager step with autograd.grad per loss, over all parameters.

    TorchJD's UPGrad aggregates the concatenated gradients.
    """
    model, losses, optimizer = network(arch, size)
    parameters, aggregator = list(model.parameters()), UPGrad()

    def run() -> None:
        values = losses(model(x), x)
        rows = []
        for value, weight in zip(values, losses.weights_at(1000), strict=True):
            row = torch.autograd.grad(value * weight, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(row, parameters, strict=True)
            rows.append(
                torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])
            )
        update = aggregator(torch.stack(rows))
        for p, g in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()

    return run


def keep(benchmark: Any, group: str, peers: dict[str, Call], rounds: int, turns: dict[str, int]) -> None:
    """Time the peers in turn; record and print their median milliseconds per step, with ratios.

    turns: how many steps a call of a peer runs, if more than one.
    """
    medians = {name: ms / turns.get(name, 1) for name, ms in interleaved(peers, rounds).items()}
    info = benchmark.extra_info
    benchmark.group, info["median_ms"] = group, medians
    info["threads"], info["device"] = torch.get_num_threads(), str(DEVICE)
    print(f"\n{group}")
    for name, ms in medians.items():
        ratios = {
            c: medians[base] / ms if "TorchJD" in c else ms / medians[base]
            for c, base in COLUMNS.items()
            if base in medians
        }
        info.setdefault("ratios", {})[name] = ratios
        print(f"  {name:36s} {ms:9.1f} ms  " + "  ".join(f"{c} {r:.3f}" for c, r in ratios.items()))
    benchmark.pedantic(next(iter(peers.values())), rounds=1)


@pytest.fixture(autouse=True)
def memory_as_in_training() -> None:
    """Set the allocator as `movae train` does; the other loops in the same process profit from it too."""
    if DEVICE.type == "cpu":
        keep_freed_memory()


@pytest.mark.parametrize(("size", "batch"), SIZES)
@pytest.mark.parametrize("arch", ARCHS)
def test_step(benchmark: Any, arch: str, size: int, batch: int) -> None:
    x = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
    chosen = OURS if size == 32 else {k: OURS[k] for k in ("sum eager", "upgrad eager", "upgrad eager bf16")}
    peers = {name: ours(arch, size, x, *variant) for name, variant in chosen.items()}
    peers["TorchJD mtl_backward eager"] = torchjd_loop(arch, size, x)
    if size == 32:
        peers["a loop of autograd.grad, TorchJD"] = grad_loop(arch, size, x)
    for call in peers.values():
        for _ in range(WARM + 1 if DEVICE.type == "cuda" else 1):
            call()  # compiles, and records
    benchmark.extra_info["extra_memory_mib"] = {name: extra_memory(call) for name, call in peers.items()}
    rounds = 15 if arch == "vae" else 7
    keep(
        benchmark,
        f"step {arch} {size}x{size} batch {batch}",
        peers,
        rounds,
        {k: 4 for k in peers if "every 4" in k},
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_loops(benchmark: Any, arch: str) -> None:
    """Time the step as `movae train` runs it and TorchJD's loop as its users do, each in its own process."""
    batch = "import torch; from benchmarks.bench_step import *; x = torch.rand(128, 3, 32, 32, device=DEVICE)"
    mine = f"{batch}; keep_freed_memory(); step = ours({arch!r}, 32, x, *OURS[NAME])"
    theirs = f"{batch}; step = torchjd_loop({arch!r}, 32, x)"
    with ExitStack() as processes:
        peers = {
            name: processes.enter_context(in_process(mine.replace("NAME", repr(name)), "step()"))
            for name in ("sum eager", "upgrad eager", "upgrad eager bf16")
        }
        peers["TorchJD mtl_backward eager"] = processes.enter_context(in_process(theirs, "step()"))
        keep(benchmark, f"step {arch} 32x32 batch 128, a process each", peers, 15 if arch == "vae" else 7, {})


@pytest.mark.parametrize("batch", [32, 128, 512])
def test_batch_sizes(benchmark: Any, batch: int) -> None:
    x = torch.rand(batch, 3, 32, 32, device=DEVICE)
    peers = {name: ours("vae", 32, x, *OURS[name]) for name in ("sum eager", "upgrad eager")}
    peers["TorchJD mtl_backward eager"] = torchjd_loop("vae", 32, x)
    keep(benchmark, f"step vae 32x32, batch {batch}", peers, 7, {})


@pytest.mark.parametrize("m", [2, 4, 8])
def test_objectives(benchmark: Any, m: int) -> None:
    """Time a step with m losses that all depend on the features of a convolutional trunk, for the cost per
    objective."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU()) for a, b in ((3, 32), (32, 64), (64, 128))),
        nn.Flatten(),
        nn.Linear(128 * 16, 128),
    ).to(DEVICE)
    heads = nn.ModuleList([nn.Linear(128, 10) for _ in range(m)]).to(DEVICE)
    x = torch.rand(128, 3, 32, 32, device=DEVICE)
    shared, task = list(trunk.parameters()), list(heads.parameters())

    def losses() -> tuple[Tensor, list[Tensor]]:
        feature = trunk(x)
        return feature, [head(feature).square().mean() for head in heads]

    def clear() -> None:
        for p in (*shared, *task):
            p.grad = None

    def plain() -> None:
        clear()
        torch.stack(losses()[1]).sum().backward()

    def movae(aggregator: nn.Module) -> Callable[[], None]:
        def run() -> None:
            clear()
            feature, values = losses()
            backward(values, features=[feature], shared=shared, task=task, aggregator=aggregator)

        return run

    def torchjd() -> None:
        clear()
        feature, values = losses()
        mtl_backward(values, features=[feature], shared_params=shared, parallel_chunk_size=1, retain_graph=True)
        jac_to_grad(shared, theirs)

    theirs = UPGrad()
    peers = {
        "sum eager": plain,
        "jacobian.backward": movae(make_aggregator("upgrad", m)),
        "TorchJD mtl_backward eager": torchjd,
    }
    keep(benchmark, f"step by the number of objectives, m = {m}", peers, 15, {})


RANKS = """
import json, sys, torch
torch.set_num_threads(1)
from benchmarks.bench_step import network
from benchmarks.measure import interleaved
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.training.train_step import TrainStep
from movae_fast.training.world import connect
world, _ = connect("cpu")
x = torch.rand(64, 3, 32, 32)
calls = {}
for agg in ("sum", "upgrad"):
    model, losses, optimizer = network("vae", 32)
    aggregator = None if agg == "sum" else make_aggregator(agg, 2)
    step = TrainStep(model, losses, aggregator, optimizer, world=world)
    def run(step=step, model=model):
        step(x, 0, model.draw_noise(64))
    calls[agg] = run
medians = interleaved(calls, 9)
if world.main:
    print(json.dumps(medians))
world.close()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks(benchmark: Any, ranks: int) -> None:
    """Time the step of `vae` in one and two processes, each with 64 images and one thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run() -> dict[str, float]:
        processes = []
        for rank in range(ranks):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes.append(subprocess.Popen([sys.executable, "-c", RANKS], env=env, stdout=subprocess.PIPE))
        outputs = [process.communicate()[0] for process in processes]
        assert all(process.returncode == 0 for process in processes)
        return json.loads(outputs[0].splitlines()[-1])

    medians = benchmark.pedantic(run, rounds=1)
    benchmark.group = f"step vae 32x32, {ranks} gloo ranks x 64"
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["upgrad over sum"] = medians["upgrad"] / medians["sum"]
    print(f"\n{ranks} ranks: {medians}, upgrad / sum {medians['upgrad'] / medians['sum']:.3f}")
