"""Run `movae curve`: rate against distortion over beta, of multi-rate runs and of separate runs, in one
plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from movae_fast.cli import parsing
from movae_fast.cli.curves import CurveConfig, check_curve, draw
from movae_fast.evaluation.curve_runs import expanded

DESCRIPTION = "Rate and distortion over beta, from one set of weights: movae curve RUN [RUN …] --betas 20"


def run(argv: Sequence[str]) -> int:
    """Parse, check, evaluate, write; the exit status."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = [*(["--runs", *argv[:count]] if count else []), *argv[count:]]
    words = parsing.normalise(words, parsing.flag_types([CurveConfig]))
    parser = parsing.build_parser("curve", [CurveConfig], DESCRIPTION)
    if not any(w.startswith(("--runs=", "--help", "--print_config")) for w in words):
        raise ValueError("which runs? movae curve RUN [RUN …], folders of runs or of a sweep")
    config = CurveConfig(**parsing.parse(parser, words, {}))
    check_curve(config)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for path in draw(config, expanded(config.runs), console):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0
