"""Define the base class of the three loaders, which gives batches of an image source on the device.

`epoch(number, start)` yields images, float32 [B, C, S, S] in the model's data range, and labels, int64 [B]. All
loaders yield the same batches; only the pixels of `dali` come from another decoder and may differ by a grey
level or two.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TypedDict

import torch
from torch import Tensor

from movae_fast.data.binarize import Binarizer
from movae_fast.data.loaders.epoch_plan import Batching, EpochPlan, plan_epoch
from movae_fast.data.sources import ImageSource
from movae_fast.data.transforms import finish


class _Options(TypedDict):
    train: bool


class LoaderOptions(_Options, total=False):
    """List the keyword arguments that every loader has, for type checkers; `Loader` explains them."""

    seed: int
    flip: bool
    normalize: bool
    bits: int
    binarizer: Binarizer | None
    rank: int
    world: int
    pad: bool


class Loader:
    """Plan epochs, and convert uint8 batches to the model's data range. Subclasses implement `batches`.

    Args:
        source: The images of one split.
        batch_size: Images per batch of this process.
        device: The device of the batches.
        train: Shuffle, mirror and give complete batches only; otherwise give the rows in order, each once.
        seed: Seed of the orders, of mirroring, and of binarization unless there is a binarizer.
        flip: Mirror a random half of the training images.
        normalize: Give images in [-1, 1] instead of [0, 1].
        bits: The number of bits of a pixel's value that are kept.
        binarizer: Converts pixels to black and white; None does not.
        rank: This process's number, of `world`.
        world: Number of processes.
        pad: Fill up the last training batch instead of leaving it out.

    Raises ValueError if the training images do not fill one batch and `pad` is False.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        device: torch.device,
        *,
        train: bool,
        seed: int = 0,
        flip: bool = False,
        normalize: bool = False,
        bits: int = 8,
        binarizer: Binarizer | None = None,
        rank: int = 0,
        world: int = 1,
        pad: bool = False,
    ) -> None:
        self.source, self.batch_size, self.device = source, batch_size, device
        self.binarizer = binarizer or Binarizer("none", "train" if train else "test", seed)
        self.rank, self.world = rank, world
        self.train, self.seed, self.flip, self.normalize = train, seed, flip and train, normalize
        self.bits = bits
        self.why = ""  # why `auto` has chosen this loader
        self.pad = pad and train
        if train and not pad and len(source) < batch_size * world:
            processes = f" on {world} processes" if world > 1 else ""
            raise ValueError(
                f"--batch_size {batch_size}{processes} is more than the {len(source)} training images: the "
                "last, incomplete batch of an epoch is dropped, so an epoch would hold none (--last_batch pad "
                "fills it)"
            )
        if self.pad:
            self._weights = torch.ones(batch_size, device=device), self.batching.last_weights().to(device)

    @property
    def batching(self) -> Batching:
        """Return how the source is divided into batches and among processes."""
        return Batching(len(self.source), self.batch_size, self.rank, self.world, self.train, self.pad)

    @property
    def note(self) -> str:
        """Return the source's message to the user, such as an outdated prepared file, or ""."""
        return self.source.note

    @property
    def left_out(self) -> list[str]:
        """Return the unreadable files that the source leaves out, each with the reason."""
        return list(self.source.skipped)

    def __len__(self) -> int:
        """Return the number of this process's batches per epoch."""
        return len(self.batching)

    @property
    def global_batch(self) -> int:
        """Return the number of images per step, over all processes."""
        return self.batching.global_batch

    def sample_weight_of(self, batch: int) -> Tensor | None:  # [B] float32
        """Return the sample weight of each image in batch number `batch` of an epoch; None if all weights are
        1.

        Images that fill up the last batch have weight 0. Over all processes the weights are 1 on average.
        """
        if not self.pad:
            return None
        return self._weights[batch == len(self) - 1]

    def plan(self, number: int) -> EpochPlan:
        """Return the order of epoch `number` for all processes together; a test split is read in file order."""
        if not self.train:
            return EpochPlan(torch.arange(len(self.source)), None)
        return plan_epoch(len(self.source), self.seed, number, self.flip)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's batches of epoch `number` from batch `start` on."""
        plan = self.batching.part_of_rank(self.plan(number))
        yield from self.finished(plan.rows, start, plan.flip, number if self.train else None)

    def take(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the given rows [N] of the source, in order and not mirrored."""
        yield from self.finished(rows, 0, None, None)

    def finished(
        self,
        rows: Tensor,  # [N]
        start: int,
        flip: Tensor | None,  # [N] bool
        epoch: int | None,
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield batches of `rows` in the model's data range, from batch number `start` on, with their labels.

        flip: which images are mirrored. epoch: the epoch of a dynamic binarizer's draw; None makes the static
        draw.
        """
        flip = None if flip is None else flip.to(self.device)
        numbers = rows.to(self.device)
        for at, (images, labels) in self.batches(rows, start):
            flip_here = None if flip is None else flip[at : at + len(images)]
            images = self.binarizer(images, numbers[at : at + len(images)], epoch)
            yield finish(images, flip_here, self.normalize, self.bits), labels

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield (offset in `rows`, (uint8 images, labels)) on the device, from batch number `start` on.

        Implemented by each loader.
        """
        raise NotImplementedError
