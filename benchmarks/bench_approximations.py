"""Measure what cheaper estimates of the Gramian cost, and how often their updates conflict with an objective.

  pytest benchmarks/bench_approximations.py --benchmark-only -s

Each model trains on rendered sprites. At each step the exact gradients of all objectives are computed too, from
the whole batch in the same state, and with them the update's cosine with each objective, in float64. The times
are of eager steps on one batch, with the settings in turn.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.bench_step import DEVICE, network
from benchmarks.measure import Call, interleaved, steps_on
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.data.datasets.sprites import Sprites, split_index
from movae_fast.models.buffers import keeping_buffers
from movae_fast.training.gradients import Batch
from movae_fast.training.train_step import TrainStep

STEPS, BATCH = int(os.environ.get("MOVAE_BENCH_STEPS", "60")), 64
ARCHS = ["vae", "betatc_vae", "vq_vae", "provlae"]
TORCHJD = {"norm_eps": 1e-4, "reg_eps": 1e-4}
# Name -> (aggregator, its options, options of TrainStep).
SETTINGS: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "sum": ("sum", {}, {}),
    "TorchJD's epsilons": ("upgrad", TORCHJD, {}),
    "strict": ("upgrad", {}, {}),
    "gramian_every 2": ("upgrad", {}, {"gramian_every": 2}),
    "gramian_every 4": ("upgrad", {}, {"gramian_every": 4}),
    "gramian_every 16": ("upgrad", {}, {"gramian_every": 16}),
    "gramian_batch 0.25": ("upgrad", {}, {"gramian_batch": 0.25}),
    "gramian_at features": ("upgrad", {}, {"gramian_at": "features"}),
    "gramian_at last:2": ("upgrad", {}, {"gramian_at": "last:2"}),
    "gramian_at last:4": ("upgrad", {}, {"gramian_at": "last:4"}),
}


def train_step(arch: str, name: str) -> TrainStep:
    agg, epsilons, options = SETTINGS[name]
    model, losses, optimizer = network(arch, 32)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    aggregator = None if agg == "sum" else make_aggregator(agg, len(losses.active), **epsilons).to(DEVICE)
    return TrainStep(model, losses, aggregator, optimizer, **options)


def cosines(step: TrainStep, x: torch.Tensor, noise: torch.Tensor) -> list[float]:
    """Return the cosine of the step's update with each objective's gradient at the shared parameters.

    The gradients are of the whole batch; the cosines are computed in float64.
    """
    update = step.flat.shared_grad.double()
    kept = step.flat.grad.clone()
    with keeping_buffers(step.model):
        step.fill_rows([Batch(x, noise, None)], step.losses.weights_at(1000)[step.active])
    step.flat.grad.copy_(kept)
    rows = step.rows.rows.double()
    return (rows @ update / (rows.norm(dim=1) * update.norm()).clamp_min(1e-300)).tolist()


def trained(arch: str, name: str) -> list[float]:
    """Train with the setting `name`, and return for each step the smallest cosine of its update with a
    gradient."""
    step = train_step(arch, name)
    sprites = Sprites(split_index("train"), 32, DEVICE, True)
    order = torch.randperm(len(sprites), generator=torch.Generator().manual_seed(0))
    least = []
    for number in range(STEPS):
        images, _ = sprites.gather(order[number * BATCH : (number + 1) * BATCH].to(DEVICE))
        x = images.float().div(255).expand(-1, 3, -1, -1)
        noise = step.model.draw_noise(BATCH)
        step.gradient(x, number, noise)
        least.append(min(cosines(step, x, noise)))
        step.optimizer.step()  # type: ignore[union-attr]
    return least


def one_turn(arch: str, name: str, x: torch.Tensor) -> Call:
    """Return a call that runs `gramian_every` training steps, so that exactly one of them computes the
    Gramian."""
    step = train_step(arch, name)
    run = steps_on(x, step)

    turn = step.gramian_every
    return run if turn == 1 else lambda: [run() for _ in range(turn)]


@pytest.mark.parametrize("arch", ARCHS)
def test_conflicts_and_costs(benchmark: Any, arch: str) -> None:
    x = torch.rand(BATCH, 3, 32, 32, device=DEVICE)
    medians = interleaved({name: one_turn(arch, name, x) for name in SETTINGS}, 5 if arch == "vq_vae" else 15)
    turns = {name: options.get("gramian_every", 1) for name, (_, _, options) in SETTINGS.items()}
    medians = {name: ms / turns[name] for name, ms in medians.items()}
    found = {}
    for name in SETTINGS:
        least = trained(arch, name)
        found[name] = {
            "share_of_steps_in_conflict": sum(c < -1e-3 for c in least) / STEPS,
            "worst_cosine": min(least),
            "median_ms": medians[name],
            "over_the_sum": medians[name] / medians["sum"],
        }
        shown = found[name]
        print(
            f"{arch:11s} {name:20s} {shown['share_of_steps_in_conflict']:6.1%} of steps in conflict, "
            f"worst cosine {shown['worst_cosine']:+.4f}, "
            f"{shown['median_ms']:6.1f} ms, {shown['over_the_sum']:.3f}x the sum's",
            flush=True,
        )
    benchmark.group = f"approximations: {arch} 32x32 batch {BATCH} on sprites, {STEPS} steps"
    benchmark.extra_info["settings"] = found
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(one_turn(arch, "strict", x), rounds=1)
