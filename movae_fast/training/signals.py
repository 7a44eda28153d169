"""Turn SIGTERM and SIGINT into a flag that the training loop reads after each step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """Report that SIGTERM or SIGINT arrived and that the run was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Catch SIGTERM and SIGINT while used as a context: `received` holds the signal's number instead of the
    process ending; a second signal ends it."""

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
