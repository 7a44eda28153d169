"""What `gramian_every` and `gramian_batch` cost, and how often their updates conflict with an objective.

pytest benchmarks/bench_approximations.py --benchmark-only -s
The vae trains on rendered sprites; after each step the whole batch's rows are taken once more, in the same
state, and the update's cosine with each is computed in float64.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks.bench_step import DEVICE, network
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.data.sprites import Sprites, split_index
from movae_fast.training.step import GradientStep, keeping_buffers

STEPS, BATCH = 120, 64
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("sum", {}),
    "upgrad": ("upgrad", {}),
    "upgrad, TorchJD's epsilons": ("upgrad", {"norm_eps": 1e-4, "reg_eps": 1e-4}),
    "gramian_every 2": ("upgrad", {"gramian_every": 2}),
    "gramian_every 4": ("upgrad", {"gramian_every": 4}),
    "gramian_every 16": ("upgrad", {"gramian_every": 16}),
    "gramian_batch 0.5": ("upgrad", {"gramian_batch": 0.5}),
    "gramian_batch 0.25": ("upgrad", {"gramian_batch": 0.25}),
    "gramian_batch 0.125": ("upgrad", {"gramian_batch": 0.125}),
}


def cosines(step: GradientStep, x: torch.Tensor, noise: torch.Tensor) -> list[float]:
    """The update's cosine with each objective's gradient at the shared parameters, float64, whole batch."""
    update = step.flat.shared_grad.double()
    kept = step.flat.grad.clone()
    with keeping_buffers(step.model):
        step.fill_rows([(x, noise)], step.losses.weights_at(1000)[step.active])
    step.flat.grad.copy_(kept)
    rows = step.rows.double()
    return (rows @ update / (rows.norm(dim=1) * update.norm()).clamp_min(1e-300)).tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_conflicts(benchmark: Any, name: str) -> None:
    agg, options = SETTINGS[name]
    model, losses, optimizer = network("vae", 32)
    index = split_index("train")
    sprites = Sprites(index, 32, DEVICE, True)
    epsilons = {k: options[k] for k in ("norm_eps", "reg_eps") if k in options}
    approximations = {k: v for k, v in options.items() if k not in epsilons}
    aggregator = None if agg == "sum" else make_aggregator(agg, 2, **epsilons).to(DEVICE)
    step = GradientStep(model, losses, aggregator, **approximations)
    order = torch.randperm(len(sprites), generator=torch.Generator().manual_seed(0))
    times, worst = [], []
    for number in range(STEPS):
        images, _ = sprites.gather(order[number * BATCH : (number + 1) * BATCH].to(DEVICE))
        x = images.float().div(255).expand(-1, 3, -1, -1)
        noise = model.draw_noise(BATCH)
        start = time.perf_counter()
        step(x, number, noise)
        times.append(1e3 * (time.perf_counter() - start))
        worst.append(min(cosines(step, x, noise)))
        optimizer.step()
    conflicts = sum(w < -1e-3 for w in worst) / STEPS
    benchmark.group = f"approximations: vae 32x32 batch {BATCH} on sprites, {STEPS} steps"
    benchmark.extra_info |= {
        "share_of_steps_in_conflict": conflicts,
        "worst_cosine": min(worst),
        "mean_step_ms": statistics.fmean(times[8:]),
    }
    print(
        f"\n{name:28s} {conflicts:6.1%} of steps in conflict, worst cosine {min(worst):+.3f}, "
        f"{statistics.fmean(times[8:]):.0f} ms"
    )
    benchmark.pedantic(lambda: step(x, 0, noise), rounds=1)
