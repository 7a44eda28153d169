"""Time steps of the progressive ladder VAE (plain, while a rung fades in, at a stage change) and of a usual
loop.

The usual loop keeps alpha as a Python number and makes a new optimizer at each stage.

  pytest benchmarks/bench_ladder.py --benchmark-only -s
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Call, interleaved
from movae_fast.models import ProVLAE, build_model
from movae_fast.objectives import LossVector
from movae_fast.schedules import Stages
from movae_fast.training.optim import forget_state
from movae_fast.training.stages import apply_stage
from movae_fast.training.train_step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [(32, 64, 32), (64, 64, 32)]  # side, batch, channels
STEPS, FADE = 10_000, 5_000  # a stage, and its fade-in


def network(size: int, width: int) -> ProVLAE:
    torch.manual_seed(0)
    model = build_model("provlae", (1, size, size), "sigmoid", {"hidden_dim": width}).to(DEVICE)
    assert isinstance(model, ProVLAE)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Ours:
    """Run the trainer's step on a batch, at any step of the schedule of stages."""

    def __init__(self, size: int, width: int, mode: str) -> None:
        self.model = network(size, width)
        self.losses = LossVector(self.model, [1.0, 8.0, 8.0, 8.0], "bernoulli", "sum", n_data=1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.step = TrainStep(self.model, self.losses, None, self.optimizer, compile_mode=mode)
        self.stages = Stages(1, 3, STEPS, FADE, 0.5)

    def __call__(self, x: Tensor, step: int) -> None:
        if self.stages.starts(step):
            forget_state(self.optimizer)
        apply_stage(self.stages, step, self.model, self.losses)
        self.step(x, step, self.model.draw_noise(len(x)))


class Usual:
    """Run a step of the usual loop: stage and alpha are Python numbers, and each stage gets a new optimizer."""

    def __init__(self, size: int, width: int, mode: str) -> None:
        self.model, self.stage = network(size, width), 0
        self.loss: Any = self.forward if mode == "off" else torch.compile(self.forward, dynamic=False)

    def forward(self, x: Tensor, stage: int, alpha: float) -> Tensor:
        model, newest = self.model, 3 - stage
        h, found = x, []
        for i, (block, rung, head) in enumerate(zip(model.blocks, model.rungs, model.heads, strict=True)):
            h = block(h)
            found.append(head(rung(h * alpha if i == newest else h)).chunk(2, 1))
        kls, z = [], []
        for mu, logvar in found:
            logvar = logvar.clamp(max=3)
            kls.append(-0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean())
            z.append(mu + (0.5 * logvar).exp() * torch.randn_like(mu))
        maps = []
        for i in range(3):
            factor = 0.0 if i < newest else alpha if i == newest else 1.0
            maps.append(model.generators[i](z[i]) * factor)
        y = maps[2]
        for i in (1, 0):
            y = y if y.shape[-1] == model.sides[i] else F.interpolate(y, scale_factor=2.0)
            y = model.ups[i](F.interpolate(model.joins[i](torch.cat([y, maps[i]], 1)), scale_factor=2.0))
        y = model.out(model.finish[0](F.interpolate(y, scale_factor=2.0)))
        loss = F.binary_cross_entropy_with_logits(y, x, reduction="sum") / len(x)
        return loss + sum(kl * (8.0 if i >= newest else 0.5) for i, kl in enumerate(kls))

    def __call__(self, x: Tensor, step: int) -> None:
        stage = 1 + step // STEPS
        if stage != self.stage:
            self.stage = stage
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        alpha = min(1.0, step % STEPS / FADE) if stage > 1 else 1.0
        self.optimizer.zero_grad()
        self.loss(x, stage, alpha).backward()
        self.optimizer.step()


def at(loop: Any, x: Tensor, start: int) -> Call:
    """Return a call that runs the loop's next step, counted from `start`; while a rung fades in, alpha differs
    in each."""
    number = start

    def run() -> None:
        nonlocal number
        number += 1
        loop(x, number)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(("size", "batch", "width"), SIZES)
def test_a_fade_in_step_against_a_plain_one(benchmark: Any, size: int, batch: int, width: int) -> None:
    """Time an eager plain step and one with a fade-in at stage 3, for our loop and the usual one."""
    x = torch.rand(batch, 1, size, size, device=DEVICE)
    mine, theirs = Ours(size, width, "off"), Usual(size, width, "off")
    # Both kinds of steps alternate on one network: two networks would differ in more than the step.
    calls = {
        "plain": at(mine, x, 2 * STEPS + FADE),
        "fading": at(mine, x, 2 * STEPS),
        "usual plain": at(theirs, x, 2 * STEPS + FADE),
        "usual fading": at(theirs, x, 2 * STEPS),
    }
    medians = interleaved(calls, 41 if size == 32 else 21)
    info = benchmark.extra_info
    benchmark.group = f"ladder step {size}x{size} batch {batch}"
    info["median_ms"] = medians
    info["images_per_s"] = {name: 1e3 * batch / value for name, value in medians.items()}
    info["fading_over_plain"] = medians["fading"] / medians["plain"]
    info["usual_over_ours"] = medians["usual fading"] / medians["fading"]
    info["threads"] = torch.get_num_threads()
    print(benchmark.group, {k: round(v, 2) for k, v in medians.items()})
    print({k: round(info[k], 3) for k in ("fading_over_plain", "usual_over_ours")})
    benchmark.pedantic(calls["plain"], rounds=3)


@pytest.mark.parametrize("mode", ["off", "default"])
def test_seconds_lost_at_a_stage_change(benchmark: Any, mode: str) -> None:
    """Time the first five steps of stage 2 and five steps before it, and record the difference; eager and
    compiled."""
    x = torch.rand(32, 1, 32, 32, device=DEVICE)
    lost, graphs = {}, {}
    for name, kind in (("movae", Ours), ("usual", Usual)):
        torch._dynamo.reset()
        loop = kind(32, 8, mode)
        before, change = at(loop, x, 100), at(loop, x, STEPS - 1)
        for _ in range(3):
            before()
        seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        seconds = []
        for call in (before, change):
            start = time.perf_counter()
            for _ in range(5):
                call()
            seconds.append(time.perf_counter() - start)
        lost[name] = seconds[1] - seconds[0]
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - seen
    info = benchmark.extra_info
    benchmark.group = f"stage change, {'eager' if mode == 'off' else 'compiled'}"
    info["seconds_lost"], info["graphs_compiled"] = lost, graphs
    print(benchmark.group, {k: round(v, 3) for k, v in lost.items()}, graphs)
    benchmark.pedantic(lambda: None, rounds=1)
