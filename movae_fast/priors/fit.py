"""Fit a prior with an optimizer: the loop, its checkpoints, and its evaluation on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from movae_fast.files import remove_leftovers
from movae_fast.names import ArgumentError, shown
from movae_fast.priors.base import build_prior
from movae_fast.priors.config import RESUMABLE, PriorConfig
from movae_fast.priors.latents import Latents
from movae_fast.priors.rows import DRAWS, DROPOUT, EVALUATION, Rows, batch_rows, divide, generator_of
from movae_fast.priors.step import PriorStep
from movae_fast.training import checkpoint
from movae_fast.training.config import WandbConfig
from movae_fast.training.logs import Logs
from movae_fast.training.signals import Interrupted, Signals
from movae_fast.training.world import World

EVALUATED = 1024  # rows per forward pass of an evaluation


@dataclass
class PriorRun:
    """Hold a prior that is being fitted, with its data and its progress: `at` steps are done."""

    config: PriorConfig
    folder: Path
    device: torch.device
    world: World
    latents: Latents
    rows: Rows
    prior: nn.Module
    step: PriorStep
    at: int = 0
    best: float = math.inf  # loss on the held-out rows
    logs: Logs | None = None
    window: Tensor = field(default_factory=lambda: torch.zeros(2))  # sums of loss and norm, and
    counted: int = 0  # how many steps they are of

    @property
    def steps(self) -> int:
        """Return the number of steps until the prior is fitted."""
        return int(self.config.option("steps"))

    def path_of(self, name: str) -> Path:
        """Return the path of the checkpoint `name`."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def save(self) -> None:
        """Write the checkpoint `last`; only rank 0 writes."""
        if not bool(self.step.flat.data.isfinite().all()):
            raise FloatingPointError(f"the prior's parameters are not finite after step {self.at}")
        if self.world.main:
            checkpoint.save(self.path_of("last"), self.state())

    def state(self) -> dict[str, Any]:
        """Return the sections of a checkpoint."""
        return {
            "prior": self.config.flat(),
            "of": self.latents.header["key"],
            "model": self.prior.state_dict(),
            **self.step.state_dict(),
            "window": [self.window, self.counted],
            "position": {"step": self.at, "best": self.best, "processes": self.world.size},
            **({"log": self.logs.mark()} if self.logs is not None else {}),
        }


def start(
    config: PriorConfig, folder: Path, latents: Latents, classes: int, device: torch.device, world: World
) -> PriorRun:
    """Build a prior with new weights, ready for step 0; no file is written."""
    torch.manual_seed(config.seed)
    rows = divide(latents, config.held_out)
    prior = build_prior(config, latents.values.shape[1:], latents.grids, classes)
    if not latents.grids:
        prior.standardise_by(latents.tensor(rows.fitted))  # type: ignore[operator]
    prior.to(device).train()
    step = PriorStep(config, prior, device, world)
    run = PriorRun(config, folder, device, world, latents, rows, prior, step)
    run.window = run.window.to(device)
    return run


def begin(run: PriorRun) -> None:
    """Create the folder of a new prior with its first checkpoint and its log; only rank 0 writes."""
    checkpoint.save(run.path_of("last"), run.state())
    run.logs = Logs(run.folder, run.config.flat(), WandbConfig(), None)


def restored(content: dict[str, Any], path: Path, given: PriorConfig, world: World) -> PriorConfig:
    """Return the settings with which a saved prior is resumed: the saved ones, updated by those that may
    change.

    Raises ArgumentError for a given setting that must stay the same.
    """
    saved = PriorConfig(**content["prior"])
    if "position" not in content:
        raise ValueError(f"{shown(path)} is no checkpoint of a prior that is being fitted")
    asked, has = given.resolved(), saved.resolved()
    changed = [k for k in has if k not in (*RESUMABLE, "name") and asked.get(k) != has[k]]
    if changed:
        was = ", ".join(f"{name} {has[name]}" for name in changed)
        raise ArgumentError(f"resume: {shown(path.parents[1])} has {was}, and keeps it; fit another by name")
    before = content["position"]["processes"]
    if before != world.size:
        total = saved.option("batch_size") * before
        if total % world.size:
            raise ArgumentError(
                f"resume: its {total} rows per step cannot be divided among {world.size} processes"
            )
        saved.batch_size = total // world.size
    saved.compile, saved.checkpoint_every = given.compile, given.checkpoint_every
    return saved


def go_on(run: PriorRun, content: dict[str, Any], path: Path) -> None:
    """Restore a newly built prior to the state in its checkpoint. Raises CheckpointError if that was fitted to
    other latents."""
    if content["of"] != run.latents.header["key"]:
        raise checkpoint.CheckpointError(
            f"{shown(path)} is fitted to latents {content['of'][:12]}, the run's are now "
            f"{run.latents.header['key'][:12]}: fit another under a new name"
        )
    checkpoint.load_model(run.prior, content["model"], path)
    run.step.load_state_dict(content)
    run.at, run.best = content["position"]["step"], content["position"]["best"]
    run.window, run.counted = content["window"][0].to(run.device), content["window"][1]
    if run.world.main:
        for inside in (run.folder, run.folder / "checkpoints"):
            remove_leftovers(inside)
        run.logs = Logs(run.folder, run.config.flat(), WandbConfig(), run.at, content.get("log"))


def batch(run: PriorRun, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's latents, labels and random numbers for a step."""
    size, world = run.config.option("batch_size"), run.world
    rows = batch_rows(run.rows.fitted, step, size, world.rank, world.size, run.config.seed)
    draws = run.prior.draws(size * world.size, generator_of(run.config.seed, step, DRAWS))  # type: ignore[operator]
    mine = draws[world.rank * size : (world.rank + 1) * size]
    return values_of(run, rows, mine)


def values_of(run: PriorRun, rows: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents and labels of the given rows, with their random numbers, on the device."""
    label = torch.from_numpy(run.latents.labels[rows.numpy()])
    return run.latents.tensor(rows).to(run.device), label.to(run.device), draws.to(run.device)


def fit(
    run: PriorRun, after_step: Callable[[PriorRun, dict[str, float]], None] = lambda run, line: None
) -> None:
    """Run the remaining steps. after_step: called after each step with the run and the last log line.

    Raises Interrupted after a signal, when the prior is saved, and FloatingPointError if the loss is not
    finite.
    """
    line: dict[str, float] = {}
    config = run.config
    with Signals() as signals:
        while run.at < run.steps:
            step, run.at = run.at, run.at + 1
            torch.manual_seed(generator_of(config.seed, step, DROPOUT, run.world.rank).initial_seed())
            loss, norm = run.step(step, *batch(run, step))
            run.window += torch.stack([loss.float(), norm.float()])
            run.counted += 1
            if run.at % config.log_every == 0 or run.at == run.steps:
                line = log(run, step)
            if run.at % config.eval_every == 0 or run.at == run.steps:
                line |= evaluate(run)
            after_step(run, line)
            signum = run.world.agree(signals.received)
            if signum or run.at % config.checkpoint_every == 0 or run.at == run.steps:
                run.save()
            if signum:
                raise Interrupted(signum)


def log(run: PriorRun, step: int) -> dict[str, float]:
    """Write a log line for the steps since the last one: mean loss over all processes, and gradient norm;
    return it."""
    total = run.world.sum_(run.window / run.world.size) / run.counted
    loss, norm = total.tolist()
    run.window, run.counted = torch.zeros_like(run.window), 0
    if not math.isfinite(loss):
        raise FloatingPointError(f"the prior's loss is not finite, by step {run.at}")
    epoch = step * run.config.option("batch_size") * run.world.size // max(1, len(run.rows.fitted))
    line = {"step": run.at, "epoch": epoch, "train/loss": loss, "train/grad_norm": norm}
    line["train/lr"] = run.step.rate(step)
    if run.logs is not None:
        run.logs.write(line)
    return line


@torch.no_grad()
def evaluate(run: PriorRun) -> dict[str, float]:
    """Return the loss on the held-out rows, and keep the weights if it is the lowest so far; {} if no rows are
    held out."""
    rows = run.rows.held_out
    if not len(rows):
        return {}
    draws = run.prior.draws(len(rows), generator_of(run.config.seed, 0, EVALUATION))  # type: ignore[operator]
    run.prior.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    with averaged(run):
        numbers = torch.arange(len(rows)).split(EVALUATED)[run.world.rank :: run.world.size]
        for part in numbers:
            with run.step.precision.autocast():
                loss = run.prior.loss(*values_of(run, rows[part], draws[part]))  # type: ignore[operator]
            sums += torch.stack([loss.double() * len(part), loss.new_tensor(len(part)).double()])
        total, count = run.world.sum_(sums).tolist()
        line = {"step": run.at, "epoch": 0, "held_out/loss": total / count}
        if line["held_out/loss"] < run.best:
            run.best = line["held_out/loss"]
            if run.world.main:
                best = {name: value.clone() for name, value in run.prior.state_dict().items()}
                checkpoint.save(run.path_of("best"), {"model": best, "step": run.at})
    run.prior.train()
    if run.logs is not None:
        run.logs.write(line)
    return {"held_out/loss": line["held_out/loss"]}


def averaged(run: PriorRun) -> AbstractContextManager[None]:
    """Return a context in which the prior has the moving average of its weights, if one is kept."""
    return nullcontext() if run.step.average is None else run.step.average.in_place()


def take_best(run: PriorRun) -> None:
    """Load the weights with the lowest held-out loss into the prior, or without held-out rows the averaged
    weights."""
    if len(run.rows.held_out):
        path = run.path_of("best")
        checkpoint.load_model(run.prior, checkpoint.load(path)["model"], path)
    elif run.step.average is not None:
        run.step.flat.data.copy_(run.step.average.values)
    run.prior.eval()
