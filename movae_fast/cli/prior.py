"""Run `movae prior`: fit a prior to a trained model's codes or latents, and score it on the test split."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from movae_fast.cli.flags.prior import PriorRunConfig
from movae_fast.cli.latents import described, shown
from movae_fast.cli.trained import choose_beta
from movae_fast.evaluation.prior_scores import code_scores, latent_scores
from movae_fast.evaluation.trained import adapt_config
from movae_fast.models import VAE, GaussianVAE
from movae_fast.names import shown as printable
from movae_fast.priors import fit
from movae_fast.priors.base import FILE, FOLDER, build_prior, check_kind, classes_of, save_prior
from movae_fast.priors.catalog import KINDS
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.latents import Latents, check_encodable, encode_split
from movae_fast.training import checkpoint
from movae_fast.training.build import load_model, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.device import resolve_device
from movae_fast.training.run_folder import folder_of
from movae_fast.training.signals import Interrupted
from movae_fast.training.world import World, connect


def run(flags: tuple[PriorRunConfig, PriorConfig]) -> int:
    """Fit a prior, save it with its test scores, and return the exit status: 130 after SIGINT and 143 after
    SIGTERM."""
    command, config = flags
    world, command.device = connect(command.device)
    device = resolve_device(command.device)
    console = Console(width=None if sys.stdout.isatty() else 200, quiet=not world.main)
    trained, model = load_model(Path(command.weights), device)
    adapt_config(trained, command.device, command.data_dir, command.encode_batch_size)
    validate(trained)
    check_encodable(model, trained.model.arch)
    check_kind(config, model, trained.model.arch)
    if command.beta is not None:
        choose_beta("prior", command.beta, trained, model)
    above = folder_of(Path(command.weights))
    folder = above / FOLDER / config.folder
    world.on_main(lambda: check_folder(folder, command.resume, config))
    latents = {}
    for split in ("train", "test"):
        encode = partial(encode_split, trained, model, above, split, device, partial(shown, console))
        there = world.on_main(lambda: encode()[1])  # noqa: B023
        latents[split], _ = encode()
        console.print(described(latents[split], there), highlight=False, soft_wrap=True, markup=False)
    classes = classes_of(config, latents["train"])
    try:
        began = time.perf_counter()
        prior = fitted(command, config, folder, classes, latents["train"], world, console)
    except Interrupted as interrupt:
        console.print(f"{interrupt}: saved; go on with the same command and --resume", highlight=False)
        return 128 + interrupt.signum
    except FloatingPointError as error:
        print(f"movae prior: stopped: {error}; its last checkpoint is in {folder}", file=sys.stderr)
        return 1
    if world.main:
        scores = scores_of(prior, trained, model, latents)
        save_prior(folder / FILE, config, latents["train"], classes, prior, scores)
        console.print(table(config, trained, scores))
        said = f"{folder / FILE}, after {time.perf_counter() - began:.0f} s; movae sample {above} draws from it"
        console.print(printable(said), highlight=False, soft_wrap=True, markup=False)
    return 0


def check_folder(folder: Path, resume: bool, config: PriorConfig) -> None:
    """Raise ValueError if the folder holds a prior and `resume` is not set, or if it holds none and `resume` is
    set."""
    last = folder / "checkpoints" / "last.pt"
    if resume and not KINDS[config.kind].stepped:
        raise ValueError(
            f"--resume: {config.kind} is fitted at once, there is nothing to go on with; leave it out"
        )
    if resume and not last.is_file():
        raise ValueError(f"--resume: there is no {printable(last)} to go on from; leave it out to begin")
    if not resume and folder.exists() and any(folder.iterdir()):
        again = "go on with it by --resume, or " if last.is_file() and not (folder / FILE).is_file() else ""
        raise ValueError(
            f"{printable(folder)} holds a prior, which is not overwritten: {again}give another --name, or "
            "delete it"
        )


def fitted(
    command: PriorRunConfig,
    config: PriorConfig,
    folder: Path,
    classes: int,
    latents: Latents,
    world: World,
    console: Console,
) -> nn.Module:
    """Fit the prior, or resume fitting it, and return it in evaluation mode."""
    device = resolve_device(command.device)
    if not KINDS[config.kind].stepped:
        prior = build_prior(config, latents.values.shape[1:], latents.grids, classes)
        prior.fit(latents.tensor(), config.seed)  # type: ignore[operator]
        return prior.to(device).eval()
    content: dict[str, Any] | None = None
    path = folder / "checkpoints" / "last.pt"
    if command.resume:
        content = checkpoint.load(path)
        config = fit.restored(content, path, config, world)
    work = fit.start(config, folder, latents, classes, device, world)
    if content is None:
        world.on_main(lambda: fit.begin(work))
    else:
        fit.go_on(work, content, path)
    size = sum(p.numel() for p in work.prior.parameters())
    done = f", from step {work.at:,} on" if work.at else ""
    console.print(
        f"{config.kind} ({size:,} parameters) on {len(work.rows.fitted):,} rows, {len(work.rows.held_out):,} "
        f"held out; {work.steps:,} steps of {world.size} x {config.option('batch_size')} on {device}{done}",
        highlight=False,
    )
    columns = (TextColumn("step {task.completed:,.0f}"), BarColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    )
    try:
        with bar:
            task = bar.add_task("", total=work.steps, completed=work.at, text="")
            fit.fit(work, lambda run, line: show(bar, task, run, line))
    finally:
        if work.logs is not None:
            work.logs.close()
    fit.take_best(work)
    return work.prior


def show(bar: Progress, task: Any, run: fit.PriorRun, line: dict[str, float]) -> None:
    """Advance the progress bar by a step; without a terminal, print a line per evaluation instead."""
    text = "  ".join(f"{name} {line[name]:.4g}" for name in ("train/loss", "held_out/loss") if name in line)
    bar.update(task, completed=run.at, text=text)
    if bar.disable and run.world.main and run.at % run.config.eval_every == 0:
        bar.console.print(f"step {run.at:,}/{run.steps:,}: {text}", highlight=False)


def scores_of(
    prior: nn.Module, trained: TrainConfig, model: VAE, latents: dict[str, Latents]
) -> dict[str, float]:
    """Return the scores of a fitted prior on the test split."""
    if latents["test"].grids:
        return code_scores(prior, latents["train"], latents["test"], trained.image_shape)
    assert isinstance(model, GaussianVAE)
    loader = make_loader(trained, model.device, "test")
    return latent_scores(prior, model, loader.epoch(), trained.objective.recons_dist, 0)


def table(config: PriorConfig, trained: TrainConfig, scores: dict[str, float]) -> Table:
    """Return a table of the prior's scores for printing."""
    made = Table(title=f"{config.folder} on what is encoded by {trained.model.arch}, test split")
    made.add_column("score")
    made.add_column("value", justify="right")
    for name, value in scores.items():
        made.add_row(name.replace("_", " "), f"{value:.6g}")
    return made
