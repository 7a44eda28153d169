"""Measure multi-rate VAEs: their step against the plain one, a curve in one pass, and one run against ten
beta-VAEs.

  pytest benchmarks/bench_multirate.py --benchmark-only -s
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.measure import Call, extra_memory, interleaved
from movae_fast.data import Images, ResidentLoader
from movae_fast.evaluation.linear_oracle import LinearOracle
from movae_fast.evaluation.rate_distortion import Point, curve_points, data_covariance, log_spaced
from movae_fast.models import MODELS, GaussianVAE, build_model, make_multirate
from movae_fast.objectives import LossVector, resolve_weights
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.loop import fit
from movae_fast.training.progress import Bar
from movae_fast.training.start import setup
from movae_fast.training.train_step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (1, 28, 28)
BETAS = log_spaced(0.01, 10, 10)


def network(arch: str, multirate: bool) -> GaussianVAE:
    torch.manual_seed(0)
    model = build_model(arch, SHAPE, "sigmoid", {})
    assert isinstance(model, GaussianVAE)
    if multirate:
        make_multirate(model)
    return model.to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def step(arch: str, multirate: bool, x: torch.Tensor) -> Call:
    """Return a call that runs one compiled training step on x."""
    model = network(arch, multirate)
    losses = LossVector(model, resolve_weights(MODELS[arch], SHAPE, None), "bernoulli", "sum", n_data=50_000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    train_step = TrainStep(model, losses, None, optimizer, compile_mode="default")
    number = 0

    def run() -> None:
        nonlocal number
        train_step(x, number, model.draw_noise(len(x)))
        number += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("arch", ["cnn_vae_28", "resnet_vae_28"])
def test_multirate_step(benchmark: Any, arch: str) -> None:
    """Record time and peak extra memory of the compiled step at batch 128, multi-rate against plain."""
    x = torch.rand(128, *SHAPE, device=DEVICE).round()
    peers = {"plain": step(arch, False, x), "multi-rate": step(arch, True, x)}
    medians = interleaved(peers, 9)
    memory = {name: extra_memory(call) for name, call in peers.items()}
    info = benchmark.extra_info
    benchmark.group = f"step {arch} batch 128, compiled: multi-rate against plain"
    info["median_ms"], info["extra_memory_mib"] = medians, memory
    info["time over plain"] = medians["multi-rate"] / medians["plain"]
    print(f"\n{arch}: time x{info['time over plain']:.3f}, memory {memory}")
    if min(memory.values()) > 1:  # about 0 if the step fits into memory that the process held
        info["memory over plain"] = memory["multi-rate"] / memory["plain"]
    benchmark.pedantic(peers["multi-rate"], rounds=1)


@pytest.mark.parametrize("arch", ["linear_vae", "resnet_vae_28"])
def test_curve_pass(benchmark: Any, arch: str) -> None:
    """Time 20 betas over 500 images: one pass with all betas in a batch, against one pass per beta."""
    model = network(arch, True).eval()
    images = torch.randint(0, 256, (500, *SHAPE), dtype=torch.uint8)
    loader = ResidentLoader(Images(images, torch.zeros(500, dtype=torch.long)), 500, DEVICE, train=False)
    betas = log_spaced(0.01, 10, 20)

    def one() -> None:
        curve_points(model, loader, betas, "bernoulli", 0, rows=1000)

    def each() -> None:
        for beta in betas:
            curve_points(model, loader, [beta], "bernoulli", 0, rows=1000)

    peers: dict[str, Call] = {"one pass": one, "a pass a beta": each}
    medians = interleaved(peers, 5)
    benchmark.group = f"curve {arch}, 20 betas, 500 images"
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["extra_memory_mib"] = {name: extra_memory(call) for name, call in peers.items()}
    benchmark.extra_info["a pass a beta over one pass"] = medians["a pass a beta"] / medians["one pass"]
    print(f"\n{arch}: a pass a beta takes x{medians['a pass a beta'] / medians['one pass']:.2f}")
    benchmark.pedantic(one, rounds=1)


ARCHS: dict[str, dict[str, Any]] = {
    "linear_vae": {"latent_dim": 16, "recons_dist": "gaussian", "lr": 0.01},
    "vae": {"latent_dim": 16, "hidden_dims": [32, 64], "recons_dist": "bernoulli", "lr": 0.003},
}


def trained(folder: Path, arch: str, **flags: Any) -> tuple[float, Path]:
    """Train on digits for 60 epochs; return the seconds it took and the run's folder."""
    values = {"dataset": "digits", "image_size": 16, "arch": arch, "recons_reduction": "sum", "seed": 0}
    values |= {"epochs": 60, "batch_size": 100, "scheduler": "cosine", "warmup_epochs": 3, "eval_freq": 0}
    config = TrainConfig.from_flat(values | ARCHS[arch] | flags | {"exp_dir": str(folder), "save_freq": 0})
    validate(config)
    started = time.perf_counter()
    run = setup(config)
    with Bar(run, Console(quiet=True)) as bar:
        fit(run, bar)
    assert run.logs is not None
    run.logs.close()
    return time.perf_counter() - started, folder


def points(folder: Path, betas: list[float]) -> tuple[list[Point], Any, int]:
    config, model = load_model(folder, DEVICE)
    assert isinstance(model, GaussianVAE)
    loader = make_loader(config, DEVICE, "test")
    return curve_points(model, loader, betas, config.objective.recons_dist, 0, 1000), loader, model.latent_dim


@pytest.mark.parametrize("arch", list(ARCHS))
def test_one_run_against_ten(benchmark: Any, arch: str, tmp_path: Path) -> None:
    """Compare wall time and quality of one multi-rate run with those of ten runs with one beta each, at small
    size."""
    gates = {"multirate": True, "gate_encoder": "sqrt", "gate_bias": -3.0}
    many = benchmark.pedantic(lambda: trained(tmp_path / "many", arch, **gates), rounds=1)
    curve, loader, k = points(many[1], BETAS)
    plain, seconds = [], []
    for i, beta in enumerate(BETAS):
        took, folder = trained(tmp_path / str(i), arch, beta=beta)
        seconds.append(took)
        plain += points(folder, [beta])[0]
    info = benchmark.extra_info
    benchmark.group = f"one multi-rate {arch} against ten beta-VAEs, digits 16x16, 60 epochs"
    info["seconds"] = {"multi-rate": many[0], "ten beta-VAEs": sum(seconds)}
    info["ten over one"] = sum(seconds) / many[0]
    ratios = [a.loss / b.loss for a, b in zip(curve, plain, strict=True)]
    info["loss over plain: median"], info["loss over plain: worst"] = statistics.median(ratios), max(ratios)
    if arch == "linear_vae":
        oracle = LinearOracle(data_covariance(loader), k, "squared_error")
        for name, found in (("multi-rate", curve), ("plain", plain)):
            info[f"{name}: worst loss over optimum"] = max(p.loss / oracle.optimum(p.beta).loss for p in found)
    print(f"\n{arch}: " + "  ".join(f"{k} {v}" for k, v in info.items()))
