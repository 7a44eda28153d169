"""Show the progress of encoding and describe an encoded file, for the commands that encode."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track
from torch import Tensor

from movae_fast.priors.latents import Latents


def shown(console: Console, batches: Iterable[Tensor], count: int) -> Iterable[Tensor]:
    """Yield the batches, and show a progress bar with how many of `count` are done."""
    return track(batches, "encoding", count, console=console, transient=True, disable=not console.is_terminal)


def described(latents: Latents, there: bool) -> str:
    """Return one line that describes an encoded file; `there` says that it existed before."""
    rows = len(latents.values)
    if latents.grids:
        each = " + ".join(f"{grid.height}x{grid.width} of {grid.codes:,}" for grid in latents.grids)
        what = f"codes {each}, {latents.header['dtype']}"
    else:
        what = f"posteriors of {latents.values.shape[2]} latents, {latents.header['dtype']}"
    mirrored = ", half of them mirrored" if rows > latents.images else ""
    return f"{latents.path}: {rows:,} rows{mirrored} ({what}){', which was there' if there else ''}"
