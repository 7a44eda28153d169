"""Time NVAE's training step (summed loss, UPGrad over scales, multi-rate) against a usual eager loop.

pytest benchmarks/bench_nvae.py --benchmark-only -s
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.measure import Call, allocated_memory, interleaved, steps_on
from movae_fast.aggregation import UPGrad
from movae_fast.models import NVAE, make_multirate
from movae_fast.objectives import LossVector, reconstruction
from movae_fast.schedules import LossSchedule
from movae_fast.training.optim import Adamax
from movae_fast.training.train_step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (1, 28, 28)
PRESET, BATCH = ("mnist", 128) if DEVICE.type == "cuda" else ("tiny", 64)
PENALTY = 1e-2


def network(multirate: bool = False) -> NVAE:
    torch.manual_seed(0)
    model = NVAE(SHAPE, "sigmoid", preset=PRESET)
    if multirate:
        make_multirate(model, gate_encoder="sigmoid", gate_decoder="sigmoid")
    return model.to(DEVICE).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def ours(
    x: torch.Tensor, agg: str = "sum", multirate: bool = False, mode: str = "off", recompute: bool = False
) -> Call:
    """Return a call that runs one training step on x as `movae train` does."""
    model = network(multirate)
    if recompute:
        model.recompute_cells()
    schedule = LossSchedule(penalty=lambda step: PENALTY)
    weights = [1.0] * len(model.objectives)
    losses = LossVector(model, weights, "bernoulli", "sum", n_data=50_000, schedule=schedule)
    optimizer = Adamax(model.parameters(), lr=1e-3, eps=1e-3)
    aggregator = UPGrad.strict() if agg == "upgrad" else None
    train_step = TrainStep(model, losses, aggregator, optimizer, jacobian="all", compile_mode=mode)
    return steps_on(x, train_step)


def usual(x: torch.Tensor) -> Call:
    """Return a call that runs one step of a usual loop: summed loss with penalty, one backward, torch's
    Adamax."""
    model = network()
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, eps=1e-3)
    penalised = model.penalised()

    def run() -> None:
        optimizer.zero_grad()
        out = model(x)
        loss = reconstruction(out.preactivation, x, model.likelihood_as("bernoulli"), "sum")
        loss = loss + torch.cat([kl.sum(1) for kl in out.kl]).sum() / len(x)
        (loss + PENALTY * model.penalty(penalised)).backward()
        optimizer.step()

    return run


def test_steps(benchmark: Any) -> None:
    """Record the CPU time and the peak memory of all kinds of steps in turn, and their ratios to the step on
    the summed loss."""
    x = torch.rand(BATCH, *SHAPE, device=DEVICE).round()
    compiled = {"compiled": ours(x, mode="default")} if DEVICE.type == "cuda" else {}
    peers: dict[str, Call] = {
        "sum": ours(x),
        "UPGrad over scales": ours(x, "upgrad"),
        "multi-rate": ours(x, multirate=True),
        "sum, recomputed": ours(x, recompute=True),
        "multi-rate, recomputed": ours(x, multirate=True, recompute=True),
        "usual loop": usual(x),
        **compiled,
    }
    # A shared machine's CPU seconds: a neighbour's work is no part of a step.
    medians = interleaved(peers, 9, time.process_time)
    memory = {name: allocated_memory(call) for name, call in peers.items()}
    info = benchmark.extra_info
    benchmark.group = f"NVAE step, preset {PRESET}, batch {BATCH}"
    info["median_ms" if DEVICE.type == "cuda" else "median_cpu_ms"], info["allocated_mib"] = medians, memory
    info["time over the sum"] = {name: ms / medians["sum"] for name, ms in medians.items()}
    info["memory over the sum"] = {name: mib / memory["sum"] for name, mib in memory.items()}
    for name, ms in medians.items():
        ratio, of_memory = ms / medians["sum"], memory[name] / memory["sum"]
        print(f"{name:20s} {ms:9.1f} ms x{ratio:.3f}  {memory[name]:8.1f} MiB x{of_memory:.3f}")
    benchmark.pedantic(peers["sum"], rounds=1)
