"""Read what a run has written: its settings, its metrics, its pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import yaml

from movae_fast.names import ArgumentError
from movae_fast.training.log_lines import read_lines
from movae_fast.training.run_list import find_run


@dataclass(frozen=True)
class TrainedRun:
    """Give access to the settings, metrics and pictures in a run's folder; the files are read on access.

    `TrainedRun.find("latest")` returns the run that was started last. A notebook shows a run as a table of its
    test metrics.
    """

    folder: Path

    @classmethod
    def find(cls, name: str | os.PathLike[str]) -> TrainedRun:
        """Return the run in a folder, given its path or a name of a folder below runs/: in full, its beginning,
        or "latest".

        Raises ValueError, which lists the existing runs, for a name that belongs to no run or to several.
        """
        folder = find_run(os.fspath(name))
        if not (folder / "config.yaml").is_file():
            raise ArgumentError(f"run {os.fspath(name)}: {folder} holds no run: no config.yaml in it")
        return cls(folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the run's settings by name, as they are in config.yaml."""
        values = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        return dict(values)

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl in order, each a dictionary with `step`, `epoch` and metrics whose
        names begin with `train/` or `test/`.

        `pandas.DataFrame(run.history())` makes a table of them.
        """
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def metrics(self) -> dict[str, float]:
        """Return metric -> its last value in the log, for every metric of `train/` and `test/`."""
        last: dict[str, float] = {}
        for line in self.history():
            last |= {name: value for name, value in line.items() if "/" in name}
        return last

    def pictures(self) -> list[Path]:
        """Return the paths of the run's pictures and plots, the newest last."""
        paths = [p for p in (self.folder / "figures").glob("*") if p.suffix in (".png", ".gif")]
        return sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name))

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        metrics = {name: value for name, value in self.metrics.items() if name.startswith("test/")}
        rows = "".join(
            f"<tr><td>{escape(name.removeprefix('test/').replace('_', ' '))}</td>"
            f'<td style="text-align:right">{value:.5g}</td></tr>'
            for name, value in metrics.items()
            if isinstance(value, int | float)
        )
        c = self.config
        title = escape(f"{c.get('arch')} on {c.get('dataset')}, {c.get('agg')}: {self.folder}")
        return f"<table><caption>{title}</caption><tr><th>test split</th><th>value</th></tr>{rows}</table>"
