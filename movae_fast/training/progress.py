"""Show a progress bar with epoch, objectives, images per second and time left; without a terminal, print one
line per epoch."""

from __future__ import annotations

import importlib.util
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from movae_fast.training.run import Run
from movae_fast.training.train_step import TrainStep


def shows_bars(console: Console) -> bool:
    """Return whether the console redraws lines: a terminal, or a notebook that has ipywidgets."""
    return console.is_terminal and not (console.is_jupyter and importlib.util.find_spec("ipywidgets") is None)


class Bar:
    """Show the progress bar of one run; used as a context."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_bars(console),
            transient=True,
        )
        self.metrics = "first steps…"
        self.task = self.progress.add_task(
            "", total=run.total_steps, completed=run.step, epoch=self.epoch, metrics=self.metrics
        )

    @property
    def epoch(self) -> str:
        return f"{min(self.run.epoch + 1, self.run.epochs)}/{self.run.epochs}"

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def step(self) -> None:
        """Advance the bar by one optimizer step."""
        self.progress.update(self.task, completed=self.run.step, epoch=self.epoch, metrics=self.metrics)

    def compiling(self, step: TrainStep) -> None:
        """Show what the next step will compile, if anything, since compiling takes minutes without other
        output."""
        if region := step.compiles():
            self.progress.update(self.task, metrics=f"compiling the step ({region})…")
            self.progress.refresh()

    def log(self, line: dict[str, float]) -> None:
        """Show the objectives and the speed of a log line."""
        names = self.run.losses.names
        parts = [f"{name} {line[f'train/{name}']:.4g}" for name in names if f"train/{name}" in line]
        self.metrics = f"{'  '.join(parts)}  {line['train/images_per_s']:,.0f} images/s"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False)
