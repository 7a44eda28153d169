"""Divide sentences into batches of one padded length, and give them on the device.

With a multiple of 1 all sentences of a batch have the same length and nothing is padded, as in published
training. A larger multiple rounds the lengths up, which gives fewer shapes, as compiled graphs need, and fuller
batches; the rest is padding, which a model masks. As with images, an epoch depends only on the seed and its
number, so that epoch and batch are a position, and several processes together give the batches of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data.loaders.epoch_plan import plan_epoch
from movae_fast.data.text.source import TextSource
from movae_fast.names import ArgumentError


def pad_length(lengths: Tensor, multiple: int) -> Tensor:
    """Return the padded length in tokens of sentences with `lengths` words: with <s> and </s>, rounded up to
    the multiple."""
    return (lengths + 2 + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class TextBatch:
    """Describe one process's batch: which sentences it has, their padded length, and how often each counts."""

    rows: Tensor  # [B] int64 of the source
    length: int  # T
    weights: Tensor | None  # [B] float32 how often each counts, 1 on average over all processes; None: once


class TextBatching:
    """Divide sentences of the given lengths [N] into batches, and the batches among processes.

    A bucket holds the sentences of one padded length, in the order of the corpus. Its global batches have
    batch_size x world sentences, the last one the rest. In training every process gets equally many sentences
    of a global batch; if that does not come out even, sentences from the beginning of the bucket are repeated
    with sample weight 0. With `pad` the rest is filled up to a whole batch in the same way. Evaluation gives
    each sentence once, to each process every world-th batch.
    """

    def __init__(
        self,
        lengths: Tensor,  # [N] words
        batch_size: int,  # of one process
        *,
        rank: int = 0,
        world: int = 1,
        train: bool = True,
        multiple: int = 1,
        pad: bool = False,
        reshuffle: bool = False,
    ) -> None:
        if batch_size < 1 or multiple < 1:
            raise ArgumentError(f"batch_size {batch_size}, pad_multiple {multiple}: both must be at least 1")
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.train, self.pad, self.reshuffle = train, pad, reshuffle
        padded = pad_length(lengths, multiple)
        order = padded.argsort(stable=True)
        sizes = padded[order].unique_consecutive(return_counts=True)
        self.buckets = list(zip(order.split(sizes[1].tolist()), sizes[0].tolist(), strict=True))
        step = batch_size * (world if train else 1)
        # Each global batch by its bucket and its first place there.
        self.places = [(k, at) for k, (rows, _) in enumerate(self.buckets) for at in range(0, len(rows), step)]

    def __len__(self) -> int:
        """Return the number of this process's batches per epoch."""
        return len(self.places) if self.train else len(range(self.rank, len(self.places), self.world))

    @property
    def shapes(self) -> list[int]:
        """Return the padded lengths that occur in batches, ascending."""
        return [length for _, length in self.buckets]

    def epoch(self, seed: int, number: int) -> Iterator[TextBatch]:
        """Yield this process's batches of epoch `number`, in random order in training."""
        if not self.train:
            for k, at in self.places[self.rank :: self.world]:
                rows, length = self.buckets[k]
                yield TextBatch(rows[at : at + self.batch_size], length, None)
            return
        buckets = self.buckets
        if self.reshuffle:
            mixed = torch.Generator().manual_seed(seed * 1_000_003 + number + 1)
            buckets = [(rows[torch.randperm(len(rows), generator=mixed)], t) for rows, t in buckets]
        for place in plan_epoch(len(self.places), seed, number, flip=False).rows.tolist():
            k, at = self.places[place]
            rows, length = buckets[k]
            yield self._part(rows, length, at)

    def _part(self, rows: Tensor, length: int, at: int) -> TextBatch:
        """Return this process's part of the global batch that begins at position `at` of a bucket's `rows`."""
        whole = self.batch_size * self.world
        real = min(whole, len(rows) - at)
        size = self.batch_size if self.pad else -(-real // self.world)  # of each process
        places = at + self.rank * size + torch.arange(size)
        counted = places < at + real
        weights = None if real == size * self.world else counted * (size * self.world / real)
        return TextBatch(rows[torch.where(counted, places, places % len(rows))], length, weights)


class TextLoader:
    """Give batches of a source on the device: tokens int64 [B, T] with <s>, </s> and padding, and labels [B].

    Args:
        source: The sentences of one split.
        batch_size: Sentences per batch of this process.
        device: Where the batches are wanted.
        train: Permute the batches; otherwise each sentence once, the shortest first.
        seed: Seed of the orders.
        multiple: What lengths are rounded up to a multiple of; 1 for batches of equal length.
        pad: Fill up a bucket's last batch with sentences that count 0, so that all batches have one size.
        reshuffle: Divide the buckets anew at each epoch, instead of permuting the same batches.
        rank: This process's number, of `world`.
        world: Number of processes.
    """

    def __init__(
        self,
        source: TextSource,
        batch_size: int,
        device: torch.device,
        *,
        train: bool,
        seed: int = 0,
        multiple: int = 1,
        pad: bool = False,
        reshuffle: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.batch_size, self.device = source, batch_size, device
        self.why, self.left_out, self.normalize = "", list[str](), False  # what loaders of images say
        self._planned: list[TextBatch] = []  # of the epoch that was begun last
        self.train, self.seed = train, seed
        self.batching = TextBatching(
            source.lengths,
            batch_size,
            rank=rank,
            world=world,
            train=train,
            multiple=multiple,
            pad=pad and train,
            reshuffle=reshuffle,
        )

    def __len__(self) -> int:
        """Return the number of this process's batches per epoch."""
        return len(self.batching)

    @property
    def note(self) -> str:
        """Return one line on the split for the user: its size, and what was cut, skipped or unknown."""
        return self.source.summary

    @property
    def global_batch(self) -> int:
        """Return the largest number of sentences per step, over all processes."""
        return self.batching.batch_size * self.batching.world

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's batches of epoch `number` from batch `start` on."""
        for tokens, labels, _ in self.weighted_epoch(number, start):
            yield tokens, labels

    def weighted_epoch(
        self, number: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:  # [B, T], [B], [B] float32 or None
        """Yield this process's batches of epoch `number` from batch `start` on, with the sample weight of each
        sentence.

        The weights are 1 on average over all processes; None if all are 1.
        """
        self._planned = list(self.batching.epoch(self.seed, number))
        for place in range(start, len(self._planned)):
            yield self.batch(place)

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:  # [B, T], [B], [B] float32 or None
        """Return batch `number` of the epoch that was started last, as `weighted_epoch` yields it."""
        batch = self._planned[number]
        tokens, labels = self.source.gather(batch.rows, batch.length)
        return tokens.to(self.device), labels.to(self.device), self.sample_weight_of(number)

    def sample_weight_of(self, batch: int) -> Tensor | None:  # [B] float32
        """Return the sample weight of each sentence in batch number `batch` of the epoch that was started last;
        None if all are 1."""
        weights = self._planned[batch].weights
        return None if weights is None else weights.to(self.device)

    def take(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the given rows [N] of the source, in order, each padded to its longest sentence."""
        for some in rows.split(self.batch_size):
            tokens, labels = self.source.gather(some)
            yield tokens.to(self.device), labels.to(self.device)
