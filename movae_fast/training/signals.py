"""Turn SIGTERM and SIGINT into a flag that the loop reads after each step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """Say that SIGTERM or SIGINT arrived and the run is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Set `received` on SIGTERM and SIGINT while entered, instead of ending the process; a second signal
    ends it."""

    def __init__(self) -> None:
        self.received = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[signum] = signal.signal(signum, self.receive)
            except ValueError:  # not the main thread: the caller's signals are the caller's
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signum
