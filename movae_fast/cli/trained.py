"""Choose beta and a new output folder, for the commands on a trained model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from movae_fast.evaluation.trained import rates_of
from movae_fast.models import VAE
from movae_fast.training.config import TrainConfig


def choose_beta(command: str, beta: float, trained: TrainConfig, model: VAE) -> None:
    """Set a multi-rate model to the beta asked for. Raises ValueError for a model that has one beta only."""
    rates = rates_of(trained, model, "beta")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"--beta {beta:g} must be above 0 and finite")
    say_extrapolation(command, beta, beta, rates.beta_min, rates.beta_max)
    model.set_beta(beta)


def say_extrapolation(command: str, least: float, most: float, beta_min: float, beta_max: float) -> bool:
    """Warn on standard error of betas outside the trained range; whether there are any."""
    # A range that went through float32 and back is still itself.
    outside = least < beta_min * (1 - 1e-6) or most > beta_max * (1 + 1e-6)
    if outside:
        asked = f"beta {least:g}" if least == most else f"betas {least:g} to {most:g}"
        print(
            f"movae {command}: {asked}: trained for {beta_min:g} to {beta_max:g}, the model extrapolates",
            file=sys.stderr,
        )
    return outside


def new_outdir(folder: Path) -> Path:
    """Make the folder and return it; refuse one that holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--outdir: {folder} is not empty and is not overwritten; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
