"""Which loader a run uses, and its construction."""

from __future__ import annotations

from typing import Any

import torch

from movae_fast.data.loaders import dali
from movae_fast.data.loaders.loader import Loader, ResidentLoader, TorchLoader, set_bytes
from movae_fast.data.prefetch import RESIDENT_SHARE, free_memory
from movae_fast.data.sources import ImageFiles

LOADERS: dict[str, type[Loader]] = {
    "resident": ResidentLoader,
    "dali": dali.DaliLoader,
    "torch": TorchLoader,
}


def choose_loader(
    name: str, source: Any, device: torch.device, share: float = RESIDENT_SHARE
) -> tuple[str, str]:
    """The loader that `auto` means, and why in a few words.

    Resident where images lie in memory (or are mapped, or rendered) or their decoded set takes at most `share`
    of the device's free memory; for larger sets dali if it is installed, else torch.
    """
    if name != "auto":
        return name, ""
    if not isinstance(source, ImageFiles):
        return "resident", ""
    need, free = set_bytes(source), free_memory(device)
    size = f"{need / 1e9:.2g} GB of images, {free / 1e9:.2g} GB free"
    if need <= share * free:
        return "resident", f"chosen for {size}"
    kind = "dali" if dali.available() else "torch"
    return kind, f"chosen for {size}; resident takes at most {share:.0%}"


def make_loader(
    kind: str,
    source: Any,
    batch_size: int,
    device: torch.device,
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    compiled: bool = True,
    **options: Any,
) -> Loader:
    """The loader called `kind` over `source`, told what concerns it of the options that not all have."""
    if kind == "torch":
        options["num_workers"] = num_workers
    elif kind == "dali":
        options |= {"num_threads": num_workers, "prefetch": prefetch}
    else:
        options["compiled"] = compiled
    return LOADERS[kind](source, batch_size, device, **options)
