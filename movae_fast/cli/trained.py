"""Set beta and create the output folder, for the commands that take a trained model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.evaluation.trained import rates_of
from movae_fast.models import VAE
from movae_fast.training.config import TrainConfig


def choose_beta(command: str, beta: float, trained: TrainConfig, model: VAE) -> None:
    """Set a multi-rate model to `beta`, and warn if it was not trained for it.

    command: name for the warning. Raises ValueError for a model that is not multi-rate, or a beta that is not
    positive.
    """
    rates = rates_of(trained, model, "beta")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"--beta {beta:g} must be above 0 and finite")
    say_extrapolation(command, beta, beta, rates.beta_min, rates.beta_max)
    model.set_beta(beta)


def say_extrapolation(command: str, least: float, most: float, beta_min: float, beta_max: float) -> bool:
    """Warn on stderr if betas from `least` to `most` leave the trained range, and return whether they do."""
    # A range that went through float32 and back is still itself.
    outside = least < beta_min * (1 - 1e-6) or most > beta_max * (1 + 1e-6)
    if outside:
        asked = f"beta {least:g}" if least == most else f"betas {least:g} to {most:g}"
        print(
            f"movae {command}: {asked}: trained for {beta_min:g} to {beta_max:g}, the model extrapolates",
            file=sys.stderr,
        )
    return outside


def say_source(command: str, source: SampleSource) -> None:
    """Write to stderr what a command's samples are drawn from, so that stdout holds only what it made."""
    print(f"movae {command}: {source.sentence}", file=sys.stderr)


def new_outdir(folder: Path) -> Path:
    """Create the output folder and return it. Raises ValueError if it already holds files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--outdir: {folder} is not empty and is not overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
