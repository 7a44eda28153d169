"""Define and check the flags of `movae runs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from movae_fast.cli import parsing
from movae_fast.training.limits import Bounds, check_values

DESCRIPTION = "The runs below a folder: movae runs [FOLDER] --sort test_loss"
SortKey = Literal["started", "name", "dataset", "arch", "agg", "step", "test_loss", "test_mse", "conflict"]


@dataclass
class RunsConfig:
    """List of runs.

    Args:
        folder: Folder to look below; may stand first without its flag.
        sort: What the list is sorted by, largest (or latest) last.
        limit: Show this many, the last ones; 0 means all.
        json: Print one JSON object per run, with its flags, instead of a table.
    """

    folder: str = "runs"
    sort: SortKey = "started"
    limit: int = 0
    json: bool = False


def parse(argv: Sequence[str]) -> RunsConfig:
    """Return the flags of `movae runs`. Raises ValueError for an invalid one."""
    config = parsing.read_flags(RunsConfig, "runs", DESCRIPTION, parsing.first_word_as("folder", argv))
    check_values(config, limit=Bounds(0))
    return config
