"""Trace training steps with torch's profiler (`--profile N`)."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch

from movae_fast.training.cuda_graph import WARM
from movae_fast.training.run import Run

SKIPPED = WARM + 1  # steps before the trace: they compile, choose algorithms, allocate, record


class Profiler:
    """Trace `--profile` steps after the first few, and write them to the run's trace.json, on process 0; used
    as a context."""

    def __init__(self, run: Run) -> None:
        self.left, self.before = run.config.run.profile, SKIPPED
        self.path = run.folder / "trace.json"
        self.profile: torch.profiler.profile | None = None
        self.on = self.left > 0 and run.world.main

    def __enter__(self) -> Profiler:
        return self

    def step(self) -> None:
        """Count a finished step; start or end the trace if it is time."""
        if not self.on:
            return
        if self.profile is None:
            self.before -= 1
            if self.before <= 0:
                self.profile = torch.profiler.profile(acc_events=True)
                self.profile.start()
            return
        self.left -= 1
        if self.left == 0:
            self.finish()

    def finish(self) -> None:
        """End the trace and write it to the file."""
        self.on = False
        if self.profile is not None:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.path))
            self.profile = None

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the run's own error, if any, is the one to show
            self.finish()
