"""Feed batches from the worker processes of torch's DataLoader."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from movae_fast.data.loaders.loader import Loader, LoaderOptions
from movae_fast.data.sources import ImageSource

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


class TorchLoader(Loader):
    """Read an image source in `num_workers` processes; used for datasets that do not fit on the device, without
    DALI."""

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        device: torch.device,
        num_workers: int = 0,
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(source, batch_size, device, **options)
        self.num_workers = num_workers

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield what `Loader.batches` yields. A worker's ValueError is raised here without the worker's
        traceback."""
        at = start * self.batch_size
        loader: DataLoader = DataLoader(
            cast("Dataset", self.source),  # All that a DataLoader asks for is __len__ and __getitem__.
            batch_size=self.batch_size,
            sampler=rows[at:].tolist(),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            # Otherwise the workers' base seed would be drawn from training's own random state.
            generator=torch.Generator().manual_seed(self.seed),
        )
        batches = started(loader)
        try:
            for images, labels in batches:
                yield at, (images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
                at += len(images)
        except ValueError as error:  # The text of a worker's error ends with its own message.
            # The error's traceback would keep the workers alive until the garbage collector finds it.
            if stop := getattr(batches, "_shutdown_workers", None):
                stop()
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def started(loader: DataLoader) -> Iterator[Any]:
    """Return the loader's iterator; if some workers cannot be started, end those that were started, and
    raise."""
    try:
        return iter(loader)
    except (OSError, RuntimeError) as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half: Any = frame.f_locals.get("self")
            if hasattr(half, "_worker_init_fn") and half is not loader:
                half._shutdown = True  # Otherwise its destructor fails over what it has not made yet.
                for process in getattr(half, "_workers", []):
                    process.kill()
        raise
