"""Define and check the flags of `movae compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.cli import parsing
from movae_fast.training.limits import check_values
from movae_fast.training.run_list import find_run

DESCRIPTION = "Runs beside each other: the flags that differ, the scores, the curves: movae compare RUN RUN …"


@dataclass
class CompareConfig:
    """Comparison.

    Args:
        runs: Runs, by folder or by the beginning of their name; may stand first without the flag.
        out: Folder for compare.png; the default is compare/ in the first run's folder.
    """

    runs: list[str]
    out: str | None = None


def parse(argv: Sequence[str]) -> CompareConfig:
    """Return the flags of `movae compare` with runs as paths. Raises ValueError for an invalid flag or unknown
    run."""
    words = parsing.first_words_as("runs", argv)
    which = "which runs? movae compare RUN RUN …; movae runs lists them"
    config = parsing.read_flags(CompareConfig, "compare", DESCRIPTION, words, "runs", which)
    check_values(config)
    config.runs = list(dict.fromkeys(str(find_run(name)) for name in config.runs))
    if len(config.runs) < 2:
        raise ValueError(f"{config.runs[0]}: a comparison needs two runs or more; movae runs lists them")
    return config
