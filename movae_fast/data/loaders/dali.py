"""Feed batches that DALI decodes, crops and resizes, on a GPU or on CPU threads.

This module reads the files, in the order of the epoch plan that all loaders share, so several processes and
resuming work as in the other loaders. DALI decodes only files that every decoder reads alike (`plain_size`).
Any other file, and one that DALI refuses, is decoded by `decode` and passed to DALI as raw pixels, so that a
file gives the same image, or the same error, in all loaders.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.decode import crop_box, decode
from movae_fast.data.find_files import opened
from movae_fast.data.loaders.loader import Loader, LoaderOptions
from movae_fast.data.plain_files import plain_size
from movae_fast.data.prefetch import prefetched, processors
from movae_fast.data.sources import ImageFiles, ImageSource

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.tensors import TensorListCPU, TensorListGPU
    from typing_extensions import Unpack  # in typing from Python 3.11 on


def available() -> bool:
    """Return whether DALI is installed."""
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
    """Read image files through a DALI pipeline with `num_threads` threads, which works `prefetch` batches
    ahead."""

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        device: torch.device,
        num_threads: int = 0,
        prefetch: int = 2,
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(source, batch_size, device, **options)
        require()
        if not isinstance(source, ImageFiles):
            raise ValueError("--loader dali decodes image files; this dataset has none: use --loader resident")
        if source.mode not in ("bilinear", "bicubic"):
            raise ValueError(
                f"--loader dali resamples: --resize {source.mode} is for --loader torch or resident"
            )
        self.files = source
        self.num_threads = num_threads or processors()
        self.prefetch = prefetch
        self.labels = torch.tensor(source.labels)
        self._pillow_rows: set[int] = set()  # rows of files that DALI refuses
        self._stream: torch.cuda.Stream | None = None
        self._idle: list[tuple[Pipeline, _Feed]] = []  # pipelines that wait for their next epoch

    def finished(
        self, rows: Tensor, start: int, flip: Tensor | None, epoch: int | None
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield what `Loader.finished` yields; on a CPU a thread converts images to floats in advance."""
        batches = super().finished(rows, start, flip, epoch)
        return prefetched(batches) if self.device.type == "cpu" else batches

    def batches(self, rows: Tensor, start: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield what `Loader.batches` yields; on a CPU the images are DALI's own buffer, valid until the next
        batch."""
        at = start * self.batch_size
        while at < len(rows):
            with suppress(_RefusedError), closing(self._decoded(rows[at:].tolist())) as decoded:
                for images in decoded:
                    labels = self.labels[rows[at : at + len(images)]]
                    yield at, (images, labels.to(self.device, non_blocking=True))
                    at += len(images)

    def _decoded(self, rows: list[int]) -> Generator[Tensor, None, None]:
        """Yield the images of `rows` in batches, uint8 [B, C, S, S].

        Raises _RefusedError once a file that DALI refuses has been identified; the caller then calls again with
        the remaining rows, and Pillow decodes that file.
        """
        pipe, feed = self._idle.pop() if self._idle else self._build(self.batch_size, self.prefetch)
        feed.begin(rows)
        try:
            while (out := self._run(pipe, feed)) is not None:
                yield self._to_torch(out)
        except GeneratorExit:
            # The caller leaves in mid-epoch. What was read ahead must not be the next epoch's first batches.
            feed.begin([])
            while self._run(pipe, feed) is not None:
                pass
            raise
        finally:
            if feed.ended:
                pipe.reset()
                self._idle.append((pipe, feed))

    def _run(self, pipe: Pipeline, feed: _Feed) -> TensorListCPU | TensorListGPU | None:
        """Return the pipeline's next batch, or None at the end of the epoch.

        Raises the error of the file that made the pipeline fail, or _RefusedError if only DALI refuses it.
        """
        try:
            (out,) = pipe.run()
        except StopIteration:
            feed.ended = True
            return None
        except RuntimeError:
            feed.raise_cause()
            refused = self._find_refused([row for batch in feed.recent for row in batch])
            if not refused:
                raise
            self._pillow_rows |= refused
            raise _RefusedError from None
        return out

    def _find_refused(self, rows: list[int]) -> set[int]:
        """Return the rows of files that DALI cannot decode although Pillow can, since Pillow tolerates some
        damage."""
        refused = set()
        while rows:
            pipe, feed = self._build(1, prefetch=1)
            feed.begin(rows)
            try:
                while rows:
                    pipe.run()
                    rows = rows[1:]
            except RuntimeError:  # The pipeline is of no use after that.
                refused.add(rows[0])
                rows = rows[1:]
        return refused - self._pillow_rows

    def _build(self, batch_size: int, prefetch: int) -> tuple[Pipeline, _Feed]:
        """Build a DALI pipeline that decodes, crops and resizes; return it with the callable that supplies its
        batches."""
        from nvidia.dali import Pipeline, fn, types

        _keep_pipelines_from_children()

        cuda = self.device.type == "cuda"
        feed = _Feed(self.files, batch_size, self._pillow_rows, kept=prefetch + 2)
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
                output_type=types.RGB if self.files.channels == 3 else types.GRAY,
                normalized_anchor=False,
                normalized_shape=False,
                axis_names="HW",
            )
            cubic = self.files.mode == "bicubic"
            images = fn.resize(
                images,
                size=[self.files.size, self.files.size],
                interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
                antialias=True,
            )
            pipe.set_outputs(images)
        pipe.build()
        return pipe, feed

    def _to_torch(self, out: TensorListCPU | TensorListGPU) -> Tensor:  # [B, C, S, S] uint8, channels last
        """Return a batch of DALI's as a tensor: on a CPU the same memory, on a GPU a copy."""
        tensor = out.as_tensor()
        if self.device.type != "cuda":
            return torch.from_dlpack(tensor).permute(0, 3, 1, 2)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        # DALI uses the buffer again at the next run, so the images are copied out of it. Given a stream,
        # feed_ndarray puts the copy on it and returns without waiting; DALI sees to it that its next use of the
        # buffer comes later, which its own iterator for PyTorch relies on too. The copy has its own stream,
        # since on the training step's stream it, and with it the next batch, would queue behind the step.
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            images = torch.empty(tensor.shape(), dtype=torch.uint8, device=self.device)
            feed_ndarray(tensor, images, cuda_stream=stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(stream)
        images.record_stream(current)
        return images.permute(0, 3, 1, 2)


# The bytes of files, and the corners (top, left) and extents (height, width) of their crops.
_Encoded = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


class _RefusedError(Exception):
    """Report that DALI refused a file of the batch, and that the loader has identified it."""


@cache
def _keep_pipelines_from_children() -> None:
    """Prevent forked worker processes from garbage-collecting the DALI pipelines that they inherit.

    A worker that did so would crash, since the pipelines' threads exist only in its parent.
    """
    os.register_at_fork(after_in_child=gc.freeze)


class _Feed:
    """Supply a DALI pipeline, which calls this object, with its next batch: encoded files and the crop in
    each."""

    def __init__(self, source: ImageFiles, batch_size: int, pillow_rows: set[int], kept: int) -> None:
        self.source, self.batch_size, self.pillow_rows = source, batch_size, pillow_rows
        self.coming: Generator[tuple[list[int], _Encoded]] = prefetched(_ for _ in ())
        self.recent: deque[list[int]] = deque(maxlen=kept)  # rows of batches that may be in the pipeline
        self.error: Exception | None = None
        self.ended = False

    def begin(self, rows: list[int]) -> None:
        """Start a pass over the given rows."""
        self.coming.close()
        batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        # Files are read while a step is computed. DALI asks for them only while the step waits for images.
        self.coming = prefetched((batch, self.read_all(batch)) for batch in batches)
        self.ended = False

    def __call__(self) -> _Encoded:
        try:
            rows, encoded = next(self.coming)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error  # DALI passes on the message alone.
            raise
        self.recent.append(rows)
        return encoded

    def read_all(self, rows: list[int]) -> _Encoded:
        """Read the files of a batch; return their bytes, and the crops' corners and extents."""
        data, anchors, shapes = zip(*(self.read(row) for row in rows), strict=True)
        return list(data), list(anchors), list(shapes)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a file as bytes that DALI can decode, and the crop's corner (top, left) and extent (height,
        width)."""
        path, channels = self.source.files[row], self.source.channels
        try:
            with opened(path) as file:
                data = file.read()
        except OSError:
            data = b""  # `decode` says what is wrong.
        size = None if row in self.pillow_rows else plain_size(data, channels)
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

    def raise_cause(self) -> None:
        """Raise the error of the file that made the pipeline fail, if there is such a file."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error from None
        for row in (row for batch in self.recent for row in batch):
            decode(self.source.files[row], self.source.channels)
