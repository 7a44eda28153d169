"""The training loop.

A step is: forward, Jacobian rows, Gramian, aggregation (`GradientStep`), clipping, optimizer, schedule. Nothing
in it reads a value on the host; metrics stay on the device until a log line is due.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from movae_fast.training.evaluate import MeanImage, evaluate, mean_image, reconstruction_mse
from movae_fast.training.progress import Bar
from movae_fast.training.run import Run


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """SIGTERM or SIGINT arrived; the run is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def fit(run: Run, bar: Bar) -> dict[str, float]:
    """Train to the last step and return the final test figures.

    Raises Interrupted after a signal (the run is saved), NonFiniteError for a loss that became NaN or infinite.
    """
    clip = run.config.optimizer.max_grad_norm
    final: dict[str, float] = {}
    with Signals() as signals:
        while run.epoch < run.epochs:
            run.model.train()
            for x, _ in run.train_loader.epoch(run.epoch, start=run.batch):
                record, out = run.gradient(x, run.step, diagnose=log_due(run, 1))
                if clip:
                    torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
                run.optimizer.step()
                run.scheduler.step()
                run.telemetry.record(record, out, len(x))
                run.step, run.batch = run.step + 1, run.batch + 1
                if log_due(run):
                    log(run, bar)
                bar.step()
                if signals.received:
                    run.telemetry.check(run.step)
                    run.save("last")
                    raise Interrupted(signals.received)
                if run.config.run.checkpoint_every and run.step % run.config.run.checkpoint_every == 0:
                    run.telemetry.check(run.step)
                    run.save("last")
                if run.finished:
                    break
            final = end_epoch(run, bar) or final
    return final


def log_due(run: Run, ahead: int = 0) -> bool:
    """Whether a log line follows the last step, or the one `ahead` of it: a full window, an epoch's end."""
    batch = run.batch + ahead
    last = batch == len(run.train_loader) or run.step + ahead == run.total_steps
    return last or batch % run.config.run.log_every == 0


def log(run: Run, bar: Bar) -> None:
    """Fetch the window's metrics and write them."""
    line = run.telemetry.fetch(run.step)
    bar.log(line)
    write(run, line | {"train/lr": run.optimizer.param_groups[0]["lr"]})


def write(run: Run, line: dict[str, Any]) -> None:
    assert run.logs is not None
    run.logs.write({"step": run.step, "epoch": run.epoch, **line})


def end_epoch(run: Run, bar: Bar) -> dict[str, float]:
    """Evaluate, save and draw where it is due; the test figures if there are any."""
    every = run.config.run
    run.epoch, run.batch = run.epoch + 1, 0
    due = every.eval_freq > 0 and run.epoch % every.eval_freq == 0
    figures: dict[str, float] = {}
    if due or run.finished:
        figures = evaluate(run.model, run.losses, run.test_loader, seed=every.seed or 0)
        if run.finished:
            baseline = MeanImage(mean_image(run.train_loader), run.test_loader.normalize)
            figures["test/mse_mean_image"] = reconstruction_mse(baseline, run.test_loader)
        write(run, figures)
        names = run.losses.names
        bar.say(
            f"epoch {run.epoch}/{run.epochs}, step {run.step:,}: test "
            + "  ".join(f"{name} {figures[f'test/{name}']:.4g}" for name in names)
            + f"  mse {figures['test/mse']:.4g}"
            + (f"  ({bar.figures.split('  ')[-1]})" if "images/s" in bar.figures else "")
        )
        if figures["test/loss"] < run.best:
            run.best = figures["test/loss"]
            run.save("best")
    kept = every.save_freq > 0 and run.epoch % every.save_freq == 0
    if kept:
        run.save(f"epoch_{run.epoch:04d}")
    run.save("last")
    if run.draw is not None and (kept or run.finished):
        run.draw(run, f"epoch_{run.epoch:04d}")
    run.telemetry.restart_clock()
    return figures


class Signals:
    """While entered, SIGTERM and SIGINT set `received` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.received = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[signum] = signal.signal(signum, self.receive)
            except ValueError:  # not the main thread: the caller's signals are the caller's
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signum
