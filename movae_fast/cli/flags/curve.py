"""Define and check the flags of `movae curve`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.training.limits import PAIRS, ZERO, Bounds, check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Rate and distortion over beta, from one set of weights: movae curve RUN [RUN …] --betas 20"


@dataclass
class CurveConfig:
    """Curves.

    Args:
        runs: Runs, checkpoints, folders of runs or of a sweep; may stand first without the flag. A multi-rate
            run gives a curve, a plain run one point at its beta.
        betas: Betas of a curve, evenly spaced in their logarithm; those of plain runs are added to them.
        beta_min: Least beta; the default is the least that the run was trained for.
        beta_max: Greatest beta, likewise.
        split: Images to evaluate on.
        out: Folder for the files; the default is curve/ in the first run's folder.
        limit: Use this many evenly spaced images; 0 means all.
        batch_size: Rows at a time, a row being an image (or sentence) at one beta: a pass takes all betas
            at once, batch_size / betas images at a time; more betas than batch_size take several passes.
        samples: Images whose codes give MIG, for data with known discrete factors; 0 leaves it out.
        seed: Seed of the draws.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        data_dir: Folder of the original files, if not where training had it.
    """

    runs: list[str]
    betas: int = 20
    beta_min: float | None = None
    beta_max: float | None = None
    split: Literal["test", "train"] = "test"
    out: str | None = None
    limit: int = 0
    batch_size: int = 1000
    samples: int = 10_000
    seed: int = 0
    device: str = "auto"
    data_dir: str | None = None


def check_curve(config: CurveConfig) -> None:
    """Raise ValueError for flag values that are invalid whatever the runs, such as --beta_min above
    --beta_max."""
    check_values(config, betas=Bounds(1, 10_000), samples=ZERO)
    least = math.ulp(0.0) if config.beta_min is None else config.beta_min
    most = sys.float_info.max if config.beta_max is None else config.beta_max
    if not 0 < least < most or not math.isfinite(most):
        ends = [f"--{name} {end:g}" for name in PAIRS if (end := getattr(config, name)) is not None]
        raise ValueError(
            f"{' and '.join(ends)}: --beta_min must be above 0 and below --beta_max, which is finite"
        )


def parse(argv: Sequence[str]) -> CurveConfig:
    """Return the flags of `movae curve` with runs as paths. Raises ValueError for an invalid flag or unknown
    run."""
    words = parsing.first_words_as("runs", argv)
    which = "which runs? movae curve RUN [RUN …], folders of runs or of a sweep"
    config = parsing.read_flags(CurveConfig, "curve", DESCRIPTION, words, "runs", which)
    check_curve(config)
    config.runs = [str(find_run(name)) for name in config.runs]
    return config
