"""Choose the loader for an image source, by name or by the free memory (`auto`), and make it."""

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
    """Return the name of the loader to use, and the reason if it was chosen automatically ("" otherwise).

    `name` is returned unless it is "auto". "auto" means resident if the images are in memory, mapped or
    rendered, or if the decoded files take at most `fraction` of the device's free memory; otherwise dali if it
    is installed, else torch.
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
    """Make the loader `kind` over `source`.

    `num_workers`, `prefetch` and `compiled` are passed on to the loaders that have them; all loaders have the
    other options.
    """
    make: Callable[..., Loader] = LOADERS[kind]
    if kind == "torch":
        return make(source, batch_size, device, num_workers=num_workers, **options)
    if kind == "dali":
        return make(source, batch_size, device, num_threads=num_workers, prefetch=prefetch, **options)
    return make(source, batch_size, device, compiled=compiled, **options)
