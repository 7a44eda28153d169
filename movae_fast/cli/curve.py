"""Run `movae curve`: rate against distortion over beta, of multi-rate runs and of separate runs, in one
plot."""

from __future__ import annotations

import sys

from rich.console import Console

from movae_fast.cli.curves import draw
from movae_fast.cli.flags.curve import CurveConfig
from movae_fast.evaluation.curve_runs import expanded


def run(config: CurveConfig) -> int:
    """Evaluate the runs, write the rate-distortion curves, print the files' paths, and return the exit
    status."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for path in draw(config, expanded(config.runs), console):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0
