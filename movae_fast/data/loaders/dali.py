"""The `dali` loader: files are read here; DALI decodes, crops and resizes them, on a GPU or on a CPU's threads.

The order is the plan that all loaders share, batch by batch, so shards and resuming are theirs too. DALI
decodes what every decoder reads alike, by `plain_size`. Any other file, and one that DALI refuses, goes through
`decode` first and reaches DALI as raw pixels: one meaning, and one error, for each loader.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.decode import crop_box, decode, plain_size
from movae_fast.data.find_files import opened
from movae_fast.data.loaders.loader import Loader
from movae_fast.data.prefetch import ahead, processors
from movae_fast.data.sources import ImageFiles


def available() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def require() -> None:
    """Raise ValueError if DALI is not installed."""
    if not available():
        extra = "dali-cuda12" if (torch.version.cuda or "13").startswith("12.") else "dali"
        raise ValueError(
            f"--loader dali needs DALI: pip install 'movae-fast[{extra}]', or use --loader torch or resident"
        )


class DaliLoader(Loader):
    """Image files through a DALI pipeline with `num_threads` decoding threads, `prefetch` batches ahead."""

    def __init__(
        self,
        source: Any,
        batch_size: int,
        device: torch.device,
        num_threads: int = 0,
        prefetch: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(source, batch_size, device, **options)
        require()
        if not isinstance(source, ImageFiles):
            raise ValueError("--loader dali decodes image files; this dataset has none: use --loader resident")
        if source.mode not in ("bilinear", "bicubic"):
            raise ValueError(
                f"--loader dali resamples: --resize {source.mode} is for --loader torch or resident"
            )
        self.num_threads = num_threads or processors()
        self.prefetch = prefetch
        self.labels = torch.tensor(source.labels)
        self._by_pillow: set[int] = set()  # rows that DALI does not decode
        self._stream: torch.cuda.Stream | None = None
        self._idle: list[tuple[Any, _Feed]] = []  # pipelines that wait for their next epoch

    def finished(
        self, rows: Tensor, start: int, flip: Tensor | None, epoch: int | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """As in Loader; on a CPU a step never waits for the conversion either."""
        batches = super().finished(rows, start, flip, epoch)
        return ahead(batches) if self.device.type == "cpu" else batches

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """As in Loader; on a CPU a batch is DALI's own buffer, valid until the next one is asked for."""
        at = start * self.batch_size
        while at < len(rows):
            with suppress(_RefusedError), closing(self._decoded(rows[at:].tolist())) as decoded:
                for images in decoded:
                    labels = self.labels[rows[at : at + len(images)]]
                    yield at, (images, labels.to(self.device, non_blocking=True))
                    at += len(images)

    def _decoded(self, rows: list[int]) -> Generator[Tensor, None, None]:
        """Batches of uint8 [B, C, S, S]. Raises _RefusedError once it knows how to decode the rest."""
        pipe, feed = self._idle.pop() if self._idle else self._build(self.batch_size, self.prefetch)
        feed.begin(rows)
        try:
            while (out := self._run(pipe, feed)) is not None:
                yield self._to_torch(out)
        except GeneratorExit:
            # Left in mid-epoch: what was read ahead must not be the next epoch's first batches.
            feed.begin([])
            while self._run(pipe, feed) is not None:
                pass
            raise
        finally:
            if feed.ended:
                pipe.reset()
                self._idle.append((pipe, feed))

    def _run(self, pipe: Any, feed: _Feed) -> Any:
        """The pipeline's next batch, None at the end of the epoch."""
        try:
            (out,) = pipe.run()
        except StopIteration:
            feed.ended = True
            return None
        except RuntimeError:
            feed.blame()
            refused = self._find_refused([i for part in feed.recent for i in part])
            if not refused:
                raise
            self._by_pillow |= refused
            raise _RefusedError from None
        return out

    def _find_refused(self, rows: list[int]) -> set[int]:
        """Which of these files DALI does not decode, though Pillow does: it reads around some damage."""
        refused = set()
        while rows:
            pipe, feed = self._build(1, prefetch=1)
            feed.begin(rows)
            try:
                while rows:
                    pipe.run()
                    rows = rows[1:]
            except RuntimeError:  # after which a pipeline is of no use
                refused.add(rows[0])
                rows = rows[1:]
        return refused - self._by_pillow

    def _build(self, batch_size: int, prefetch: int) -> tuple[Any, _Feed]:
        from nvidia.dali import Pipeline, fn, types

        _keep_pipelines_from_children()

        cuda = self.device.type == "cuda"
        feed = _Feed(self.source, batch_size, self._by_pillow, kept=prefetch + 2)
        pipe = Pipeline(
            batch_size=batch_size,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if cuda else None,
            prefetch_queue_depth=prefetch,
        )
        with pipe:
            data, anchor, shape = fn.external_source(source=feed, num_outputs=3, batch=True)
            images = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                device="mixed" if cuda else "cpu",
                output_type=types.RGB if self.source.channels == 3 else types.GRAY,
                normalized_anchor=False,
                normalized_shape=False,
                axis_names="HW",
            )
            cubic = self.source.mode == "bicubic"
            images = fn.resize(
                images,
                size=[self.source.size, self.source.size],
                interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
                antialias=True,
            )
            pipe.set_outputs(images)
        pipe.build()
        return pipe, feed

    def _to_torch(self, out: Any) -> Tensor:  # uint8 [B, C, S, S], channels last
        tensor = out.as_tensor()
        if self.device.type != "cuda":
            return torch.from_dlpack(tensor).permute(0, 3, 1, 2)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        # The buffer is DALI's again at the next run, so the images are copied out of it. Given a stream,
        # feed_ndarray puts the copy on it and returns without waiting; that DALI's next use of the buffer comes
        # after it is DALI's affair, whose own iterator for PyTorch rests on the same. On the training step's
        # stream the copy, and with it the next batch, would queue behind the step: it has a stream of its own.
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            images = torch.empty(tensor.shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(tensor, images, cuda_stream=stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(stream)
        images.record_stream(current)
        return images.permute(0, 3, 1, 2)


_Encoded = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]  # files' bytes; crops' corners, extents


class _RefusedError(Exception):
    """DALI decodes a file of the batch no more; by now it is known which one."""


@cache
def _keep_pipelines_from_children() -> None:
    """A forked worker crashes if it collects a pipeline that it inherited: the threads are its parent's."""
    os.register_at_fork(after_in_child=gc.freeze)


class _Feed:
    """What the pipeline calls for its next batch: encoded files, and where the crop lies in each."""

    def __init__(self, source: ImageFiles, batch_size: int, by_pillow: set[int], kept: int) -> None:
        self.source, self.batch_size, self.by_pillow = source, batch_size, by_pillow
        self.coming: Generator[tuple[list[int], _Encoded]] = ahead(_ for _ in ())
        self.recent: deque[list[int]] = deque(maxlen=kept)  # batches that may be in the pipeline
        self.error: Exception | None = None
        self.ended = False

    def begin(self, rows: list[int]) -> None:
        self.coming.close()
        parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        # Read while a step is computed: DALI would ask for it in the midst of the step's waiting for images.
        self.coming = ahead((part, self.read_all(part)) for part in parts)
        self.ended = False

    def __call__(self) -> _Encoded:
        try:
            part, batch = next(self.coming)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error  # DALI passes on its message alone
            raise
        self.recent.append(part)
        return batch

    def read_all(self, rows: list[int]) -> _Encoded:
        data, anchors, shapes = zip(*(self.read(i) for i in rows), strict=True)
        return list(data), list(anchors), list(shapes)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """File i as bytes that DALI decodes, and the crop's corner and extent in it."""
        path, channels = self.source.files[i], self.source.channels
        try:
            with opened(path) as file:
                data = file.read()
        except OSError:
            data = b""  # `decode` says what is wrong
        size = None if i in self.by_pillow else plain_size(data, channels)
        if size is None:
            pixels = decode(path, channels, data if data else None)
            size = pixels.shape[:2]
            data = b"P%d %d %d 255\n" % (6 if channels == 3 else 5, size[1], size[0]) + pixels.tobytes()
        top, left, height, width = crop_box(path, self.source.box, *size)
        return (
            np.frombuffer(data, np.uint8),
            np.array((top, left), np.int32),
            np.array((height, width), np.int32),
        )

    def blame(self) -> None:
        """After a failure: raise the error of the file that caused it, if one did."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error from None
        for i in (i for part in self.recent for i in part):
            decode(self.source.files[i], self.source.channels)
