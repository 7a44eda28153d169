"""Call functions of the user's at a step, at an epoch's end and at a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movae_fast.training.train_step import StepMetrics


def nothing(*_: Any) -> None:
    """Do nothing: the callback that nobody gave."""


@dataclass(frozen=True)
class Callbacks:
    """Hold what is called while a run trains; the first argument is the run, `movae_fast.training.run.Run`.

    All of them are called in every process, between two steps, and may read but not change the run.

    on_step: (run, metrics) after each optimizer step, `run.step` of them being done. The metrics are a
        `StepMetrics` of tensors on the device: `losses` [m] and others. Nothing is read on the host for the
        call, so the loop waits for the device only if the function itself reads a value (`.item()`,
        `float()`). A later step may write into the same memory: clone what is to be kept.
    on_epoch_end: (run, metrics) after an epoch, its evaluation and its checkpoints. The metrics are numbers by
        name, `test/loss` among them; empty where the epoch was not evaluated.
    on_checkpoint: (run, path) after a checkpoint was written. Process 0 writes it.
    """

    on_step: Callable[[Any, StepMetrics], object] = nothing
    on_epoch_end: Callable[[Any, dict[str, float]], object] = nothing
    on_checkpoint: Callable[[Any, Path], object] = nothing
