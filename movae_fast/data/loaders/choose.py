"""Choose the loader for a source by name or, for `auto`, by the memory that is free; and make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from movae_fast.data.loaders import dali
from movae_fast.data.loaders.loader import Loader, LoaderOptions
from movae_fast.data.loaders.resident import ResidentLoader, set_bytes
from movae_fast.data.loaders.torch_workers import TorchLoader
from movae_fast.data.memory import RESIDENT_FRACTION, free_memory
from movae_fast.data.sources import ImageFiles, ImageSource

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

LOADERS: dict[str, type[Loader]] = {
    "resident": ResidentLoader,
    "dali": dali.DaliLoader,
    "torch": TorchLoader,
}


def choose_loader(
    name: str, source: ImageSource, device: torch.device, fraction: float = RESIDENT_FRACTION
) -> tuple[str, str]:
    """Return a loader's name, which is `name` itself unless that is `auto`, and the reason for a choice.

    `auto` means resident where images lie in memory (or are mapped, or rendered) or their decoded set takes at
    most `fraction` of the device's free memory; for larger sets dali if it is installed, else torch.
    """
    if name != "auto":
        return name, ""
    if not isinstance(source, ImageFiles):
        return "resident", ""
    need, free = set_bytes(source), free_memory(device)
    size = f"{need / 1e9:.2g} GB of images, {free / 1e9:.2g} GB free"
    if need <= fraction * free:
        return "resident", f"chosen for {size}"
    kind = "dali" if dali.available() else "torch"
    return kind, f"chosen for {size}; resident takes at most {fraction:.0%}"


def make_loader(
    kind: str,
    source: ImageSource,
    batch_size: int,
    device: torch.device,
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    compiled: bool = True,
    **options: Unpack[LoaderOptions],
) -> Loader:
    """Return the loader called `kind` over `source`.

    Of `num_workers`, `prefetch` and `compiled` it gets those that it knows; all loaders know the other options.
    """
    make: Callable[..., Loader] = LOADERS[kind]
    if kind == "torch":
        return make(source, batch_size, device, num_workers=num_workers, **options)
    if kind == "dali":
        return make(source, batch_size, device, num_threads=num_workers, prefetch=prefetch, **options)
    return make(source, batch_size, device, compiled=compiled, **options)
