"""Look for a cheap Gramian whose weights do not conflict.

    python -m benchmarks.gramian_estimates --steps 60

Each model trains on rendered sprites with strict UPGrad, all rows at every step. At each step the exact Gramian
and cheap ones are taken in the same state, estimates are made of them, and the weights of each estimate are
judged by the exact Gramian: the share of steps in which their update has a cosine below -1e-3 with a row, and
the worst cosine. One trajectory judges all estimates; none of them changes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_approximations import ARCHS, BATCH, train_step
from benchmarks.bench_step import DEVICE
from movae_fast import ops
from movae_fast.data.datasets.sprites import Sprites, split_index
from movae_fast.models.buffers import keeping_buffers
from movae_fast.training.gradients import Batch, cheap_rows_of, last_parameters
from movae_fast.training.telemetry import CONFLICT
from movae_fast.training.train_step import TrainStep

Gramians = dict[str, Tensor]  # of one step: exact, cheap and sketched, [m, m] each
SKETCHES = (4, 32)  # random directions, each of which costs a forward with tangents


def gramians(step: TrainStep, x: Tensor, noise: Tensor, scale: Tensor, generator: torch.Generator) -> Gramians:
    """Return the exact Gramian of one step and cheap ones, by name; the exact gradients are in `step.rows`."""
    found = {"exact": step.gramian()}
    for at in ("features", "last:1", "last:2", "last:4"):
        places = last_parameters(step.model, at)
        with keeping_buffers(step.model):
            found[at] = ops.gramian(cheap_rows_of(step.network, Batch(x, noise, None), scale, places))
    for count in SKETCHES:
        directions = torch.randn(step.flat.n_shared, count, generator=generator)
        seen = (step.rows.spread_rows() @ directions).double()
        found[f"{count} random directions"] = seen @ seen.T / count
    return found


def corrected(cheap: Tensor, known: Gramians, name: str) -> Tensor:
    """Return the cheap Gramian, with norms and cosines corrected by its error when the exact one was last
    known.

    known: the Gramians of that step; name: which of them is the cheap one.
    """

    def parts(gramian: Tensor) -> tuple[Tensor, Tensor]:
        norms = gramian.diagonal().sqrt().clamp_min(1e-150)
        return norms, gramian / norms.outer(norms)

    norms, cosines = parts(cheap)
    old_norms, old_cosines = parts(known[name])
    exact_norms, exact_cosines = parts(known["exact"])
    norms = norms * exact_norms / old_norms
    cosines = (cosines + exact_cosines - old_cosines).clamp(-1, 1)
    return cosines * norms.outer(norms)


def estimates(history: list[Gramians]) -> dict[str, Tensor]:
    """Return estimates of the last step's Gramian, by name, from the history of all steps' Gramians."""
    now, last = history[-1], len(history) - 1
    found = {name: value for name, value in now.items() if name != "exact"}
    for every in (2, 4, 16):
        known = history[last - last % every]
        found[f"exact every {every}"] = known["exact"]
        for name in ("features", "last:2"):
            found[f"{name}, corrected every {every}"] = corrected(now[name], known, name)
    for memory in (0.5, 0.9):
        for name in ("exact", "features", "last:2"):
            mean = history[0][name]
            for past in history[1:]:
                mean = memory * mean + (1 - memory) * past[name]
            found[f"running mean of {name}, {memory}"] = mean
    return found


def least_cosine(weights: Tensor, exact: Tensor) -> float:
    """Return the smallest cosine of the update with an objective's gradient, given its weights and the exact
    Gramian."""
    along = exact @ weights
    length = (weights @ along).clamp_min(0).sqrt()
    return float((along / (exact.diagonal().sqrt() * length).clamp_min(1e-300)).min())


def judged(arch: str, steps: int, say: Callable[[str], None]) -> None:
    step = train_step(arch, "strict")
    sprites = Sprites(split_index("train"), 32, DEVICE, True)
    order = torch.randperm(len(sprites), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    history: list[Gramians] = []
    cosines: dict[str, list[float]] = {}
    for number in range(steps):
        images, _ = sprites.gather(order[number * BATCH : (number + 1) * BATCH].to(DEVICE))
        x = images.float().div(255).expand(-1, 3, -1, -1)
        noise = step.model.draw_noise(BATCH)
        step.gradient(x, number, noise)
        history.append(gramians(step, x, noise, step.scale_at(number), generator))
        for name, estimate in {"strict": history[-1]["exact"], **estimates(history)}.items():
            weights = step.aggregator.gramian_weighting(estimate)  # type: ignore[union-attr,operator]
            cosines.setdefault(name, []).append(least_cosine(weights, history[-1]["exact"]))
        step.optimizer.step()  # type: ignore[union-attr]
    say(f"{arch}, {steps} steps, batch {BATCH}")
    for name, values in cosines.items():
        share = sum(value < CONFLICT for value in values) / len(values)
        say(f"  {name:32s} {share:6.1%} of steps in conflict, worst cosine {min(values):+.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--archs", nargs="*", default=ARCHS)
    arguments = parser.parse_args()
    for arch in arguments.archs:
        judged(arch, arguments.steps, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
