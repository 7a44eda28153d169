"""List the runs below a folder with their settings and latest metrics, and find a run by a short name.

Nothing here imports torch: listing hundreds of runs reads two files of each and takes less than a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from movae_fast.training.log_lines import conflict_of, parsed

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML was built with it
TAIL = 1 << 16  # bytes at the end of a metrics.jsonl in which its last lines are looked for
RUNS = Path("runs")  # the folder that `movae train` puts runs into
LATEST = "latest"  # the name of the run that was started last
IN_ROW = ("dataset", "arch", "agg", "multirate", "seed")  # flags that the list shows
SCORES = ("test/loss", "test/mse", "train/conflict", "train/step_conflict", "test/perplexity")


@dataclass
class RunSummary:
    """Hold the entry of one run in a list of runs."""

    path: Path
    started: datetime
    config: dict[str, Any]  # flags by name, as config.yaml has them; empty if it cannot be read
    step: int = 0  # of the last log line
    # Of SCORES, the last value of each; of conflict the fraction over the log's last lines (TAIL).
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the run's folder, which commands accept as the run's name."""
        return self.path.name

    def as_row(self) -> dict[str, Any]:
        """Return the entry as plain values, for JSON and for sorting."""
        return {
            "name": self.name,
            "path": str(self.path),
            "started": self.started.isoformat(timespec="seconds"),
            **{key: self.config.get(key) for key in IN_ROW},
            "step": self.step,
            **self.scores,
        }


def run_folders(root: Path) -> Iterator[Path]:
    """Yield every folder at or below `root` that holds a run: a config.yaml and a folder checkpoints/."""
    for folder, inside, files in os.walk(root):
        if "config.yaml" in files and "checkpoints" in inside:
            inside.clear()  # a run holds no other run
            yield Path(folder)
        inside.sort()


def run_folder(path: Path) -> Path:
    """Return the folder of the run that `path` names: either that folder or a checkpoint in it.

    Raises ValueError for a path that belongs to no run, and lists some runs that exist.
    """
    for folder in (path, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    there = "it is no run, without config.yaml beside checkpoints/" if path.exists() else "there is no such run"
    others = listed(path if path.is_dir() else RUNS)
    raise ValueError(f"{path}: {there}" + (f"; {others}" if others else ""))


def listed(root: Path) -> str:
    """Return text that lists the runs below `root`, latest first, for an error message; "" if there are
    none."""
    folders = sorted(run_folders(root), key=lambda p: (p / "config.yaml").stat().st_mtime)
    return f"below {root} are {_shown(folders, root)}" if folders else ""


def summary(path: Path, flags: Sequence[str] | None = None) -> RunSummary:
    """Return the entry of the run in folder `path`; what a damaged or missing file would say is left empty.

    flags: read these flags of the configuration alone, a line each; None reads all of them, which takes a few
    milliseconds.
    """
    started = datetime.fromtimestamp((path / "config.yaml").stat().st_mtime)
    try:
        text = (path / "config.yaml").read_bytes()
        if flags is not None:
            starts = tuple(f"{flag}:".encode() for flag in flags)
            text = b"\n".join(line for line in text.split(b"\n") if line.startswith(starts))
        config = yaml.load(text, LOADER)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        config = None
    run = RunSummary(path, started, config if isinstance(config, dict) else {})
    lines = last_lines(path / "metrics.jsonl")
    for line in lines:
        run.step = line["step"]
        run.scores |= {key: line[key] for key in SCORES if isinstance(line.get(key), int | float)}
    for kind in ("", "step_"):  # a line alone may have measured one step, and then says 0 or 1
        if (conflict := conflict_of(lines, kind)) is not None:
            run.scores[f"train/{kind}conflict"] = conflict.fraction
    return run


def last_lines(path: Path) -> list[dict[str, Any]]:
    """Return the undamaged log lines at the end of a metrics.jsonl, in order."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            texts = file.read().split(b"\n")
    except OSError:
        return []
    return [line for line in map(parsed, texts) if line is not None]


def list_runs(root: Path, flags: Sequence[str] | None = None) -> list[RunSummary]:
    """Return the entries of all runs below `root`, in the order in which they were started; flags: as of
    `summary`."""
    return sorted((summary(path, flags) for path in run_folders(root)), key=lambda run: (run.started, run.path))


def find_run(name: str, root: Path = RUNS) -> Path:
    """Return the run that `name` means: an existing path, "latest", or the beginning of exactly one run's name.

    A run below `root` is known by its folder's name and by its path relative to `root`. Raises ValueError,
    which lists the runs, if the name fits none or several of them. If there is no run below `root`, the name is
    returned as a path.
    """
    path = Path(name).expanduser()
    if path.exists() or name != name.strip() or not name:
        return path
    folders = sorted(run_folders(root), key=lambda p: (p / "config.yaml").stat().st_mtime)
    if name == LATEST and folders:
        return folders[-1]
    exact = [p for p in folders if name in (p.name, p.relative_to(root).as_posix())]
    begun = exact or [
        p for p in folders if p.name.startswith(name) or p.relative_to(root).as_posix().startswith(name)
    ]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise ValueError(
            f"{name} is the beginning of {len(begun)} runs: {_shown(begun, root)}; name one of them"
        )
    if not folders:
        return path  # whoever reads it says that it is not there
    raise ValueError(
        f"{name}: there is no such file, and no run of that name; below {root} are {_shown(folders, root)}"
    )


def unlike_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder, with as many of its parents as are needed to tell all apart."""
    parts = [folder.absolute().parts for folder in folders]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _shown(folders: list[Path], root: Path, most: int = 5) -> str:
    """Return the last few runs by their paths relative to `root`, as text for an error, the latest first."""
    names = [p.relative_to(root).as_posix() for p in reversed(folders[-most:])]
    more = len(folders) - len(names)
    return ", ".join(names) + (f" and {more} more (movae runs lists them)" if more > 0 else "")
