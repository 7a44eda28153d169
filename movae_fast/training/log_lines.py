"""Read the lines of a run's metrics.jsonl; this module imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from movae_fast.files import naming


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the log lines of a metrics.jsonl, without lines that are damaged or incomplete; empty if there is
    no file.

    Raises ValueError for a file that is not text.
    """
    with naming(path):
        data = path.read_bytes() if path.exists() else b""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {number} is damaged: byte {error.start:,} is not UTF-8; remove that line"
        ) from None
    lines = (parsed(text) for text in data.split(b"\n"))
    return [line for line in lines if line is not None]


def parsed(text: bytes) -> dict[str, Any] | None:
    """Return the content of one log line, or None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if good else None


class Conflict(NamedTuple):
    """Hold how often the measured steps of a run conflicted with an objective, and the smallest cosine."""

    fraction: float  # of the measured steps
    steps: int  # that were measured
    least: float  # the smallest cosine of all


def conflict_of(lines: Sequence[Mapping[str, Any]], kind: str = "") -> Conflict | None:
    """Return the conflicts over a whole log, or None if no step was measured.

    kind: "" for the aggregated gradient, "step_" for the applied step.
    """
    names = [f"train/{kind}{name}" for name in ("conflict", "conflict_steps", "min_cosine")]
    # A line of a damaged log may lack one of them.
    whole = [line for line in lines if all(isinstance(line.get(name), int | float) for name in names)]
    seen = [[float(line[name]) for name in names] for line in whole]
    steps = int(sum(n for _, n, _ in seen))
    if not steps:
        return None
    return Conflict(
        sum(part * n for part, n, _ in seen) / steps, steps, min(least for _, n, least in seen if n)
    )
