"""What this machine has to spare for data: processors, memory, a place to remember."""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from movae_fast.files import replacing

RESIDENT_SHARE = 0.4  # of free memory, what a set may take unless told otherwise
T = TypeVar("T")
U = TypeVar("U")


def in_threads(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """work(item) of each, in order, on as many threads as there are processors; few are in flight at once."""
    left = iter(items)
    with ThreadPoolExecutor(processors()) as pool:
        while part := list(islice(left, 256)):
            yield from pool.map(work, part)


def ahead(items: Generator[T], depth: int = 1) -> Generator[T]:
    """The same items, `depth` of them made in a thread while whoever asked works on the one before."""
    end = object()
    with closing(items), ThreadPoolExecutor(1) as thread:  # the thread ends before the generator is closed
        coming: deque[Future[Any]] = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item


def processors() -> int:
    """Threads to decode with: this process's part of the processors, at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may take on the device: free ones, shared with its siblings on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    lines = dict(line.split(":", 1) for line in text.splitlines())
    free = int(lines.get("MemAvailable", "0 kB").split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", f"memory.{part}") for part in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def remembered(name: str, work: Callable[[], T], lasting: Callable[[], bool] = lambda: True) -> T:
    """work(), or what JSON made of its answer to an earlier call by that name, on whatever run of this user.

    An answer that is not `lasting` is not kept; one that was damaged on the disk is worked out again.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "movae" / f"{name}.json"
    with suppress(OSError, ValueError):
        sum_, _, text = cache.read_bytes().partition(b"\n")
        if int(sum_, 16) == zlib.crc32(text):
            return json.loads(text)
    answer = work()
    if not lasting():
        return answer
    # A home that cannot be written costs time, not the run.
    with suppress(OSError), replacing(cache) as file:
        text = json.dumps(answer).encode()
        file.write(b"%08x\n" % zlib.crc32(text) + text)
    return answer
