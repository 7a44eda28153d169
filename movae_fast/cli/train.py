"""Run `movae train`: start or resume a run, show its progress, and report its result."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from movae_fast.cli import parsing
from movae_fast.cli.errors import explained
from movae_fast.cli.flags.train import TrainFlags, build_parser
from movae_fast.cli.ladder import visualize
from movae_fast.names import first_line, shown
from movae_fast.run_pictures import draw_missing, draw_run, show_run
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate, without_export
from movae_fast.training.continuing import continued as continued_config
from movae_fast.training.continuing import settings_of
from movae_fast.training.device_checks import check_fits
from movae_fast.training.log_lines import conflict_of
from movae_fast.training.logs import read_lines
from movae_fast.training.loop import fit
from movae_fast.training.progress import Bar
from movae_fast.training.run import Run
from movae_fast.training.signals import Interrupted
from movae_fast.training.start import resume, setup, start_or_resume
from movae_fast.training.telemetry import NonFiniteError
from movae_fast.training.train_step import NOT_ASKED


def run(flags: TrainFlags) -> int:
    """Train as the flags say and return the exit status: 130 after SIGINT and 143 after SIGTERM, with the run
    saved."""
    try:
        return set_up_and_trained(flags)
    except RuntimeError as error:  # before the first step; `train` sees the later ones
        if not lost_a_process(int(os.environ.get("WORLD_SIZE", "1")), error):
            raise
        text = f"another process of this run ended ({first_line(error)[:160]}) before the first step"
        print(f"movae train: stopped: {text}", file=sys.stderr, flush=True)
        os._exit(1)


def set_up_and_trained(flags: TrainFlags) -> int:
    """Make the checks that need torch, set up or resume the run, train it, and return the exit status."""
    # A log file wants whole lines; a terminal its own width.
    quiet = os.environ.get("RANK", "0") != "0"  # of several processes one speaks
    console = Console(width=None if sys.stdout.isatty() else 200, quiet=quiet)
    resumed, config = flags.resumed, flags.config
    if config is None:
        assert resumed is not None
        work = resume(Path(resumed), lambda saved: continued(flags, saved, resumed))
        return train(work, console)
    for line in flags.notes:
        console.print(line, highlight=False)
    without_export(config, validate)
    check_fits(config)
    if config.ladder.mode == "visualize":
        return visualize(config, console)
    where = config.run.exp_dir
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if resumed is None and restarted and where is None:
        console.print("torchrun started this anew after a failure; without --exp_dir it is a run of its own")
    if resumed is None and not (restarted and where is not None):
        return train(setup(config), console)
    assert where is not None  # `flags.train.parse` refuses --resume auto without it
    return train(start_or_resume(config, lambda saved: continued(flags, saved, where)), console)


def continued(flags: TrainFlags, saved: dict[str, Any], resumed: str) -> TrainConfig:
    """Return the configuration of a resumed run: the saved one, with those of the new flags that may change.

    saved: the flags that the run was saved with; resumed: its folder or checkpoint. Raises ValueError for a
    flag that has to stay the same within a run.
    """
    values = parsing.parse(build_parser(), flags.words, {**settings_of(saved), **flags.recipe})
    return continued_config(values, saved, resumed)


def train(work: Run, console: Console) -> int:
    """Train a run that is set up, report the result, export the weights, and return the exit status.

    Interruptions and the errors that end a run are reported in one line, with the command that resumes it.
    """
    work.draw, work.show = draw_run, show_run
    started = time.perf_counter()
    again = f"go on with: movae train --resume {work.folder}"
    try:
        describe(work, console)
        draw_missing(work)
        if work.ended:
            over = work.plateau is not None and work.plateau.over
            why = ": its learning rate has decayed --plateau_decays times" if over else ""
            console.print(
                f"{work.folder} is finished at step {work.step:,}"
                + (why or "; raise --epochs or --steps to go on")
            )
            export(work, console)
            return 0
        with Bar(work, console) as bar:
            metrics = fit(work, bar)
        close_logs(work)
        report(work, metrics, console, time.perf_counter() - started)
        export(work, console)
        return 0
    except Interrupted as interrupt:
        console.print(f"{interrupt}: saved at step {work.step:,}; {again}")
        return 128 + interrupt.signum
    except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
        print(f"movae train: stopped at once, after step {work.step:,}; {again}", file=sys.stderr)
        return leave(work, 128 + signal.SIGINT)
    except (NonFiniteError, FloatingPointError) as error:
        good = f"the last good checkpoint is {work.good}" if work.good else "no checkpoint was written yet"
        print(f"movae train: stopped: {error}; {good}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and lost_a_process(work.world.size, error):
            # No clean farewell: the processes that are left would wait for the one that is gone.
            print(
                f"movae train: process {work.world.rank} stopped: another process of this run ended "
                f"({first_line(error)[:160]}); {again}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        text = explained(error)
        if text is None or isinstance(error, BrokenPipeError):
            raise
        print(f"movae train: stopped after step {work.step:,}: {text}; {again}", file=sys.stderr, flush=True)
        return leave(work, 2)
    finally:
        with suppress(OSError):  # the error that ended the run is the one to show
            close_logs(work)


def leave(work: Run, status: int) -> int:
    """Return the exit status; in a run of several processes end this process at once instead, so that the rest
    stop too."""
    if work.world.size > 1:
        sys.stderr.flush()
        os._exit(status)
    return status


def close_logs(work: Run) -> None:
    logs, work.logs = work.logs, None
    if logs is not None:
        logs.close()


def export(work: Run, console: Console) -> None:
    """Write the model's weights to the path that --export names, if it is given."""
    path = work.config.run.export
    if path is not None and work.world.main:
        work.export(Path(path))
        console.print(f"weights: {path}", highlight=False)


def lost_a_process(processes: int, error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed means that another process of the run has ended."""
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "timeout")
    return processes > 1 and any(sign in text for sign in signs)


def describe(work: Run, console: Console) -> None:
    """Print a few lines before training: the model, dataset, objectives, aggregator, steps, device and
    folder."""
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
        f"{len(work.train_loader.source):,} training and {len(work.test_loader.source):,} test "
        + ("sentences" if config.is_text else "images"),
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
    """Return a line on the aggregator, what it aggregates, and whether the whole step is projected to be
    conflict-free.

    eager: whether it runs outside the compiled step.
    """
    o = config.objective
    text = f"aggregator {o.agg}"
    if config.aggregated:
        text += f" over the {config.jacobian} Jacobian"
    if o.gramian_at != "shared":
        text += f", weights from {o.gramian_at} (approximate)"
        if eager:
            text += ", which runs uncompiled"
    if o.conflict_free == "step":
        metric = "" if o.step_metric == "identity" else f" in the metric of {config.optimizer.optimizer}"
        text += f"; the step is projected{metric}"
    return text


def notes(work: Run) -> list[str]:
    """Return lines on what a resume repaired, and on the splits' files: prepared, out of date, left out;
    and why sentences are not compiled where images are."""
    lines = list(work.notes)
    if work.config.run.distributed and work.world.size == 1:
        lines.append(
            "--distributed: this is one process; torchrun --nproc_per_node=N -m movae_fast train … has N"
        )
    if work.config.is_text and work.device.type == "cuda":
        lines.append("not compiled: torch.compile would unroll an LSTM, once for each length of the sentences")
    kind = "sentences" if work.config.is_text else "images"
    for split, loader in (("training", work.train_loader), ("test", work.test_loader)):
        if loader.note:
            lines.append(f"{split} {kind}: {loader.note}")
        if left := loader.left_out:
            shown = "; ".join(left[:3]) + ("; …" if len(left) > 3 else "")
            lines.append(f"--on_bad_image skip: {len(left)} {split} images left out: {shown}")
    return lines


def stage_line(work: Run) -> list[str]:
    """Return one line on the stages of a progressive ladder VAE; [] for any other run."""
    stages = work.progression
    if stages is None:
        return []
    fade = f", each new rung fading in over {stages.fade_in:,}" if stages.fade_in else ""
    return [f"stages {stages.first} to {stages.last} of {stages.steps:,} steps{fade}; pre-KL {stages.pre_kl:g}"]


def graph_note(work: Run) -> str:
    """Return ", one CUDA graph a step", or why a step is not captured in one; "" if that was not asked for."""
    reason = work.why_not_captured
    if reason == NOT_ASKED:
        return ""
    return f", no CUDA graph ({reason})" if reason else ", one CUDA graph a step"


def rate_line(config: TrainConfig) -> list[str]:
    """Return one line on the betas and gates of a multi-rate model; [] for any other model."""
    rate = config.multirate
    if not rate.multirate:
        return []
    if config.is_text:
        gates = "twice a sigmoid on embeddings, states and heads"
    else:
        gates = (
            f"{rate.gate_position}, {rate.gate_encoder} in the encoder, {config.gate_decoder} in the decoder"
        )
    return [
        f"multi-rate: beta from {rate.beta_min:g} to {rate.beta_max:g}, one per {config.beta_per}; gates "
        f"{gates}"
    ]


def conflict_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return rows (label, value, note) of the final table: the share of steps in conflict, and the smallest
    cosine.

    lines: the run's log. A step conflicts if the update has a negative inner product with an objective's
    gradient. There is a row for the aggregated gradient and one for the applied step, where they were measured.
    """
    rows = []
    for kind, text in (("", "update (gradient)"), ("step_", "applied step")):
        if conflict := conflict_of(lines, kind):
            label = f"{text} in conflict, of {conflict.steps:,.0f} steps"
            rows.append((label, f"{conflict.fraction:.1%}", f"cosine {conflict.least:+.2g}"))
    return rows


def skipped_row(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the row of the final table with the number of steps skipped by --skip_grad_norm; [] if there were
    none."""
    count = sum(line.get("train/skipped_steps", 0) for line in lines)
    return [("steps left out (skip_grad_norm)", f"{count:,}", "")] if count else []


def report(work: Run, metrics: dict[str, float], console: Console, seconds: float) -> None:
    """Print the final table of test objectives, with the time it took and where the pictures are."""
    table = Table(title=f"{work.config.model.arch} on {work.config.data.dataset}, {work.config.objective.agg}")
    table.add_column("test split")
    table.add_column("value", justify="right")
    table.add_column("weight", justify="right")
    for name, weight in zip(work.losses.names, work.losses.weights.tolist(), strict=True):
        table.add_row(name, f"{metrics[f'test/{name}']:.6g}", f"{weight:g}")
    table.add_row("weighted sum", f"{metrics['test/loss']:.6g}", "")
    for key, text in (
        ("mse", "MSE of reconstruction, images in [0, 1]"),
        ("mse_mean_image", "MSE of the mean training image"),
        ("token_perplexity", "exp of the bound per token"),
        ("mutual_information", "mutual information within a batch, nats"),
        ("active_units", "active latents"),
    ):
        if f"test/{key}" in metrics:
            table.add_row(text, f"{metrics[f'test/{key}']:.6g}", "")
    for key in ("nats", "bits_per_dim", "codebook_usage", "perplexity"):
        if f"test/{key}" in metrics:
            table.add_row(key.replace("_", " "), f"{metrics[f'test/{key}']:.4g}", "")
    lines = read_lines(work.folder / "metrics.jsonl") if work.world.main else []
    for row in (*conflict_rows(lines), *skipped_row(lines)):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{against_mean_image(metrics)}{seconds:.0f} s; pictures in {work.folder / 'figures'}",
        highlight=False,
    )


def against_mean_image(metrics: Mapping[str, float]) -> str:
    """Return text that compares the reconstruction error with that of the mean training image, as the baseline.

    Returns "" if there is no such baseline or its error is 0.
    """
    mean = metrics.get("test/mse_mean_image")
    if not mean:
        return ""
    less = 1 - metrics["test/mse"] / mean
    return f"reconstruction error {abs(less):.1%} {'below' if less >= 0 else 'above'} the mean image's; "
