"""Write TensorBoard's event file in the training thread.

TensorBoard's own writer runs in a thread, whose errors (a full disk) appear as a traceback in the terminal, and
it keeps up to two minutes of metrics in memory, which are lost when the process is killed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from movae_fast.files import naming
from movae_fast.names import shown


class Events:
    """Append scalars, images and texts to a new event file in `folder`, with one event per call.

    purge_step: when a run is resumed, TensorBoard ignores the scalars of earlier files from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        now = time.time()
        # The process's number is part of the name, so that restarts within a second have files of their own.
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        with naming(folder / name):
            folder.mkdir(parents=True, exist_ok=True)
            numbers = (f".{i}" for i in range(10_000))
            self.path = next(p for p in (folder / f"{name}{n}" for n in numbers) if not p.exists())
            self.file = self.path.open("wb", buffering=0)
        self.records = RecordWriter(self.file)
        self.add(Event(wall_time=now, file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.SessionStatus.START)
            self.add(Event(wall_time=now, step=purge_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append the scalars of one step; they are written to the file when this returns."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        summary = self.summary(value=values)
        self.add(self.event(wall_time=time.time(), step=step, summary=summary))

    def write_images(self, step: int, pngs: Mapping[str, tuple[bytes, int, int]]) -> None:
        """Append pictures by their tag: the content of a PNG file, its height and its width."""
        values = [
            self.summary.Value(
                tag=tag,
                image=self.summary.Image(encoded_image_string=png, height=height, width=width, colorspace=3),
            )
            for tag, (png, height, width) in pngs.items()
        ]
        self.add(self.event(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def write_text(self, tag: str, text: str) -> None:
        """Append a text, which TensorBoard shows as Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        self.add(self.event(wall_time=time.time(), summary=text_summary(tag, text)))

    def write_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Append what TensorBoard's tab HPARAMS shows: settings, and the tags of the metrics beside them."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float) else shown(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self.add(self.event(wall_time=time.time(), summary=summary))

    def add(self, event: object) -> None:
        with naming(self.path):
            self.records.write(event.SerializeToString())  # type: ignore[attr-defined]

    def close(self) -> None:
        self.file.close()
