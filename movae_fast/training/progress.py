"""Show one progress bar: epoch, objectives, images per second, time left. Without a terminal, print one line
per epoch."""

from __future__ import annotations

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


class Bar:
    """Show the bar of one run, while entered as a context."""

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
            disable=not console.is_terminal,
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
        """Show that one optimizer step is done."""
        self.progress.update(self.task, completed=self.run.step, epoch=self.epoch, metrics=self.metrics)

    def compiling(self, step: TrainStep) -> None:
        """Say what the next step compiles, if it does: minutes that would look like a frozen screen."""
        if region := step.compiles():
            self.progress.update(self.task, metrics=f"compiling the step ({region})…")
            self.progress.refresh()

    def log(self, line: dict[str, float]) -> None:
        """Show a log line's objectives and speed."""
        names = self.run.losses.names
        parts = [f"{name} {line[f'train/{name}']:.4g}" for name in names if f"train/{name}" in line]
        self.metrics = f"{'  '.join(parts)}  {line['train/images_per_s']:,.0f} images/s"

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, highlight=False, markup=False)
