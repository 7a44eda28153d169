"""Time a transformer over 16x16 codes: sampling with and without its cache, and a step against an eager loop.

pytest benchmarks/bench_priors.py --benchmark-only

Without a cache the network runs over the whole sequence for each place, which is what pythae's and MO-VAE's
samplers do.
"""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, allocated_memory, extra_memory, interleaved, record_ratios
from movae_fast.priors.codes import Grid
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.draw_codes import draw_codes, draw_codes_again
from movae_fast.priors.step import PriorStep
from movae_fast.priors.transformer import CausalPrior, build_causal
from movae_fast.training.world import World

GRIDS, BATCH, ROUNDS = (Grid(16, 16, 512),), 8, 3
CPU_TIME = "this process's CPU time"
CONFIG = PriorConfig("transformer", width=128, depth=4, dropout=0.0, steps=1000, compile="off")


def prior() -> CausalPrior:
    """Return the transformer that is measured."""
    torch.manual_seed(0)
    return build_causal(CONFIG, GRIDS, 0)


def sampling(images: int) -> dict[str, Call]:
    """Return, by implementation, the drawing of the codes of some images."""
    made, uniform = prior().eval(), torch.rand(images, 256, generator=torch.Generator().manual_seed(0))
    return {
        "with the cache": lambda: draw_codes(made, uniform),
        "without": lambda: draw_codes_again(made, uniform),
    }


def steps() -> dict[str, Call]:
    """Return, by implementation, a step on the codes of 8 images: loss, gradient, clipping, AdamW, average."""
    codes = torch.randint(512, (BATCH, 256), generator=torch.Generator().manual_seed(0))
    label, draws = torch.zeros(BATCH, dtype=torch.int64), torch.zeros(BATCH, 1)
    step = PriorStep(CONFIG, prior(), torch.device("cpu"), World())
    return {"movae": lambda: step(500, codes, label, draws), "eager loop": eager_loop(codes, label, draws)}


def eager_loop(codes: Tensor, label: Tensor, draws: Tensor) -> Call:
    """Return the step as a loop of one's own has it, with torch's parts and their defaults."""
    made = prior()
    optimizer = torch.optim.AdamW(made.parameters(), 3e-4, betas=(0.9, 0.95))
    average = torch.optim.swa_utils.AveragedModel(
        made, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )

    def step() -> None:
        optimizer.zero_grad()
        made.loss(codes, label, draws).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(made)

    return step


@pytest.mark.parametrize("images", [2, 8])
def test_sampling(benchmark: Any, images: int) -> None:
    """Time both in turn, in seconds of this process's CPU, and record images per second."""
    benchmark.group = f"sampling codes 16x16, {images} images"
    calls = sampling(images)
    medians = interleaved(calls, ROUNDS, time.process_time)
    benchmark.extra_info["median_of"] = CPU_TIME
    benchmark.extra_info["images_per_s"] = {name: 1000 * images / ms for name, ms in medians.items()}
    record_ratios(benchmark, f"{images} images", medians, "without", lambda _: "without")
    benchmark.extra_info["extra_memory_mib"] = extra_memory(calls["with the cache"])
    benchmark.pedantic(calls["with the cache"], rounds=3)


def test_step(benchmark: Any) -> None:
    """Time both in turn, in seconds of this process's CPU, and record what torch's allocator hands out."""
    benchmark.group = "a step of a transformer over codes 16x16"
    calls = steps()
    medians = interleaved(calls, 7, time.process_time)
    benchmark.extra_info["median_of"] = CPU_TIME
    record_ratios(benchmark, "step", medians, "eager-loop", lambda _: "eager loop")
    benchmark.extra_info["allocated_mib"] = {name: allocated_memory(call) for name, call in calls.items()}
    benchmark.pedantic(calls["movae"], rounds=3)
