"""`movae train`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from movae_fast.cli import parsing
from movae_fast.cli.ladder import visualize
from movae_fast.cli.pictures import draw_run
from movae_fast.names import shown
from movae_fast.training.config import SECTIONS, RunConfig, TrainConfig, check_fits, check_places, validate
from movae_fast.training.logs import read_lines
from movae_fast.training.loop import fit
from movae_fast.training.progress import Bar
from movae_fast.training.run import Run, resume, setup
from movae_fast.training.signals import Interrupted
from movae_fast.training.telemetry import NonFiniteError
from movae_fast.training.train_step import NOT_ASKED

DESCRIPTION = "Train a variational autoencoder whose loss is a vector of objectives."
# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {
    *(f.name for f in dataclasses.fields(RunConfig)),
    *(
        "data_dir",
        "download",
        "loader",
        "resident_share",
        "num_workers",
        "prefetch",
        "eval_batch_size",
        "limit_test",
    ),
    *("use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_tags"),
} - {"seed", "log_every"}
# torch-vae's own defaults, for its own spelling of the flags.
TORCH_VAE = {
    "arch": "torch_vae",
    "dataset": "mnist",
    "image_size": 64,
    "resize": "bilinear",
    "batch_size": 32,
    "max_filters": 128,
    "epochs": 100,
    "lr": 3e-4,
    "optimizer": "adamw",
    "weight_decay": 0.01,  # torch's default for AdamW, which it leaves as it is
    "seed": 0,
}
# The PyTorch port of proVLAE has no --arch either; its defaults, and the side of each set's images.
PORT = {
    "arch": "provlae",
    "ladder_net": "port",
    "dataset": "shapes3d",
    "recons_dist": "bernoulli",
    "recons_reduction": "mean",
    "beta": 8.0,
    "batch_size": 100,
    "epochs": 1,
    "lr": 5e-4,
}
PORT_SIZES = {"mnist": 28, "fashionmnist": 28}
PORT_SIZES |= dict.fromkeys(("celeba", "flowers102", "dtd", "imagenet", "ident3d"), 128)


def run(argv: Sequence[str]) -> int:
    """Parse, validate, train; the exit status (130 or 143 after SIGINT or SIGTERM, with the run saved)."""
    # A log file wants whole lines; a terminal its own width.
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes one speaks
    console = Console(width=None if sys.stdout.isatty() else 200, quiet=quiet)
    kinds = parsing.flag_types(list(SECTIONS.values()))
    words = parsing.normalise(argv, kinds)
    parser = parsing.build_parser("train", list(SECTIONS.values()), DESCRIPTION)
    resumed, rest = parsing.take(words, "resume")
    if resumed is not None and not resumed.strip():
        raise ValueError("--resume is empty; name the run to go on with")
    if resumed is not None:
        work = resume(Path(resumed), lambda saved: continued(parser, rest, saved, resumed))
    else:
        config = TrainConfig.from_flat(flags(parser, argv, words, kinds, console))
        validate(config)
        check_fits(config)
        if config.ladder.mode == "visualize":
            return visualize(config, console)
        check_places(config)
        work = setup(config)
    return train(work, console)


def flags(
    parser: parsing.OneLineParser,
    argv: Sequence[str],
    words: list[str],
    kinds: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """The flags by name: a recipe's values under the command line's."""
    name, words = parsing.take(words, "config")
    defaults = parsing.read_config(name, kinds) if name is not None else {}
    spelt = {a.partition("=")[0] for a in argv}
    if name is None and "--arch" not in spelt and spelt & {"--latent_dims", "--max_filters"}:
        defaults = dict(TORCH_VAE)
        values = parsing.parse(parser, words, defaults)
        shown = "  ".join(f"--{k} {values[k]}" for k in TORCH_VAE)
        console.print(f"torch-vae's flags: {shown}", highlight=False)
        if values["export"] is None:
            values["export"] = free_export(values, console)
        return values
    if (
        name is None
        and "--arch" not in spelt
        and spelt & {"--num_ladders", "--hidden_dim", "--fade_in_duration"}
    ):
        values = parsing.parse(parser, words, dict(PORT))
        if values["image_size"] is None:
            squeezed = "".join(c for c in values["dataset"].lower() if c.isalnum())
            values["image_size"] = PORT_SIZES.get(squeezed, 64)
        shown = "  ".join(f"--{k} {values[k]}" for k in (*PORT, "image_size"))
        console.print(f"proVLAE's flags, as its PyTorch port has them: {shown}", highlight=False)
        return values
    return parsing.parse(parser, words, defaults)


def free_export(values: dict[str, Any], console: Console) -> str | None:
    """Where torch-vae writes its weights, unless a file is there."""
    given = str(values["dataset"])
    name = f"vae_filters_{values['max_filters']:04d}_dims_{values['latent_dim'] or 128:04d}.pth"
    path = Path("models", given, name)
    if path.exists():
        console.print(f"{path} exists and is kept; the weights will be in the run's folder", highlight=False)
        return None
    return str(path)


def continued(
    parser: parsing.OneLineParser, words: list[str], saved: dict[str, Any], resumed: str
) -> TrainConfig:
    """The saved configuration with what a resumed run may change."""
    known = {k: v for k, v in saved.items() if k not in ("resume", "exp_dir", "export")}
    known = parsing.with_its_regularizer(known)
    values = parsing.parse(parser, words, known)
    kept = {"epochs", "steps"} if known["arch"] == "provlae" else set()  # they are its stages' lengths
    changed = [k for k, v in known.items() if (k not in RESUMABLE or k in kept) and values[k] != v]
    if changed:
        was = ", ".join(f"--{k} {known[k]}" for k in changed)
        raise ValueError(
            f"--resume {resumed}: the run has {was}; a resumed run keeps it. Start a new run instead"
        )
    config = TrainConfig.from_flat(values)
    validate(config)
    check_fits(config)
    return config


def train(work: Run, console: Console) -> int:
    """Fit, report, clean up."""
    work.draw = draw_run
    started = time.perf_counter()
    describe(work, console)
    try:
        if work.ended:
            console.print(
                f"{work.folder} is finished at step {work.step:,}; raise --epochs or --steps to go on"
            )
            return 0
        with Bar(work, console) as bar:
            figures = fit(work, bar)
    except Interrupted as interrupt:
        console.print(
            f"{interrupt}: saved at step {work.step:,}; go on with: movae train --resume {work.folder}"
        )
        return 128 + interrupt.signum
    except (NonFiniteError, FloatingPointError) as error:
        good = f"the last good checkpoint is {work.good}" if work.good else "no checkpoint was written yet"
        print(f"movae train: stopped: {error}; {good}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_a_process(work, error):
            raise
        # No clean farewell: the processes that are left would wait for the one that is gone.
        print(
            f"movae train: process {work.world.rank} stopped: another process of this run ended "
            f"({str(error).strip().splitlines()[0][:160]}); go on with: movae train --resume {work.folder}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    finally:
        if work.logs is not None:
            work.logs.close()
    report(work, figures, console, time.perf_counter() - started)
    export = work.config.run.export
    if export is not None and work.world.main:
        work.export(Path(export))
        console.print(f"weights: {export}", highlight=False)
    return 0


def lost_a_process(work: Run, error: RuntimeError) -> bool:
    """Whether an exchange failed because its other end is gone."""
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "timeout")
    return work.world.size > 1 and any(sign in text for sign in signs)


def describe(work: Run, console: Console) -> None:
    """What is about to be trained, in a few lines."""
    config, model = work.config, work.model
    size = sum(p.numel() for p in model.parameters())
    weights = "  ".join(
        f"{n} {w:g}" for n, w in zip(work.losses.names, work.losses.weights.tolist(), strict=True)
    )
    shape = "x".join(map(str, config.image_shape))
    processes = f"{work.world.size} x " if work.world.size > 1 else ""
    # Where the aggregator is on the host, or other processes must be asked, the Gramian parts the graph.
    step = work.train_step
    eager = step.gramian_at != "shared" and step.by_rows.mode != step.by_cheap_gramian.mode
    compiled = (", compiled" if step.by_sum.mode != "off" else "") + graph_note(work)
    images = f"{processes}{config.data.batch_size}"
    loader = type(work.train_loader).__name__.removesuffix("Loader").lower()
    why = f" ({work.train_loader.why})" if work.train_loader.why else ""
    for line in (
        f"{config.model.arch} ({size:,} parameters) on {config.data.dataset} {shape}, "
        f"{len(work.train_loader.source):,} training and {len(work.test_loader.source):,} test images",
        f"objectives: {weights}; {aggregation(config, eager)}",
        *rate_line(config),
        *stage_line(work),
        f"{work.total_steps:,} steps of {images} on {work.device}, {config.run.precision}{compiled}; "
        f"{loader} loader{why}; seed {config.run.seed}",
        *notes(work),
        f"run: {work.folder}" + (f", continued at step {work.step:,}" if work.step else ""),
    ):
        console.print(shown(line), highlight=False, markup=False)


def aggregation(config: TrainConfig, eager: bool) -> str:
    """The aggregator, what it aggregates, and whether its gradient or the whole step is without conflict."""
    o = config.objective
    text = f"aggregator {o.agg}"
    if config.aggregated:
        text += f" over the {o.jacobian} Jacobian"
    if o.gramian_at != "shared":
        text += f", weights from {o.gramian_at} (approximate)"
        if eager:
            text += ", which runs uncompiled"
    if o.conflict_free == "step":
        metric = "" if o.step_metric == "identity" else f" in the metric of {config.optimizer.optimizer}"
        text += f"; the step is projected{metric}"
    return text


def notes(work: Run) -> list[str]:
    """What is worth knowing about the splits' files: prepared, out of date, left out."""
    lines = []
    if work.config.run.distributed and work.world.size == 1:
        lines.append(
            "--distributed: this is one process; torchrun --nproc_per_node=N -m movae_fast train … has N"
        )
    for split, loader in (("training", work.train_loader), ("test", work.test_loader)):
        if loader.note:
            lines.append(f"{split} images: {loader.note}")
        if left := loader.left_out:
            shown = "; ".join(left[:3]) + ("; …" if len(left) > 3 else "")
            lines.append(f"--on_bad_image skip: {len(left)} {split} images left out: {shown}")
    return lines


def stage_line(work: Run) -> list[str]:
    """The stages of a progressive model."""
    stages = work.progression
    if stages is None:
        return []
    fade = f", each new rung fading in over {stages.fade_in:,}" if stages.fade_in else ""
    return [f"stages {stages.first} to {stages.last} of {stages.steps:,} steps{fade}; pre-KL {stages.pre_kl:g}"]


def graph_note(work: Run) -> str:
    """Whether a step on CUDA is one graph."""
    reason = work.why_not_captured
    if reason == NOT_ASKED:
        return ""
    return f", no CUDA graph ({reason})" if reason else ", one CUDA graph a step"


def rate_line(config: TrainConfig) -> list[str]:
    """The betas and gates of a multi-rate model."""
    rate = config.multirate
    if not rate.multirate:
        return []
    return [
        f"multi-rate: beta from {rate.beta_min:g} to {rate.beta_max:g}, one per {config.beta_per}; gates "
        f"{rate.gate_position}, {rate.gate_encoder} in the encoder, {rate.gate_decoder} in the decoder"
    ]


def conflict_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of the final table: how many of the measured steps conflicted with an objective, and the worst
    cosine."""
    rows = []
    for key, text in (("", "update (gradient)"), ("step_", "applied step")):
        seen = [line for line in lines if f"train/{key}conflict" in line]
        steps = sum(line[f"train/{key}conflict_steps"] for line in seen)
        if steps:
            share = (
                sum(line[f"train/{key}conflict"] * line[f"train/{key}conflict_steps"] for line in seen) / steps
            )
            least = min(line[f"train/{key}min_cosine"] for line in seen)
            rows.append((f"{text} in conflict, of {steps:,.0f} steps", f"{share:.1%}", f"cosine {least:+.2g}"))
    return rows


def report(work: Run, figures: dict[str, float], console: Console, seconds: float) -> None:
    """The final table of objectives and where everything is."""
    table = Table(title=f"{work.config.model.arch} on {work.config.data.dataset}, {work.config.objective.agg}")
    table.add_column("test split")
    table.add_column("value", justify="right")
    table.add_column("weight", justify="right")
    for name, weight in zip(work.losses.names, work.losses.weights.tolist(), strict=True):
        table.add_row(name, f"{figures[f'test/{name}']:.6g}", f"{weight:g}")
    table.add_row("weighted sum", f"{figures['test/loss']:.6g}", "")
    table.add_row("MSE of reconstruction, images in [0, 1]", f"{figures['test/mse']:.6g}", "")
    table.add_row("MSE of the mean training image", f"{figures['test/mse_mean_image']:.6g}", "")
    for key in ("codebook_usage", "perplexity"):
        if f"test/{key}" in figures:
            table.add_row(key.replace("_", " "), f"{figures[f'test/{key}']:.4g}", "")
    for row in conflict_rows(read_lines(work.folder / "metrics.jsonl") if work.world.main else []):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{against_mean_image(figures)}{seconds:.0f} s; pictures in {work.folder / 'figures'}",
        highlight=False,
    )


def against_mean_image(figures: Mapping[str, float]) -> str:
    """Return the reconstruction's error beside the mean image's, in words; "" where all images are alike."""
    mean = figures["test/mse_mean_image"]
    if not mean:
        return ""
    less = 1 - figures["test/mse"] / mean
    return f"reconstruction error {abs(less):.1%} {'below' if less >= 0 else 'above'} the mean image's; "
