"""Write TensorBoard's event file in the training thread.

TensorBoard's own writer runs in a thread, whose errors (a full disk) appear as a traceback in the terminal, and
it keeps up to two minutes of metrics in memory, which are lost when the process is killed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from movae_fast.files import naming


class Events:
    """Append scalars to a new TensorBoard event file in `folder`.

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

    def add(self, event: object) -> None:
        with naming(self.path):
            self.records.write(event.SerializeToString())  # type: ignore[attr-defined]

    def close(self) -> None:
        self.file.close()
