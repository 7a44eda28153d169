"""Files on disk: replaced whole, and their digests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20


def file_digest(path: Path, digest: Any) -> str:
    """The file's bytes through `digest` (`hashlib.sha256()`, …), in hexadecimal."""
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its name when the block ends, and goes when the block raises.

    Whatever moment the process dies at, `path` is the old file or the new one, whole; with `durable` also
    whatever moment the machine does. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                sync(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync(file: IO[Any]) -> None:
    """Wait until what was written lies on the disk."""
    file.flush()
    os.fsync(file.fileno())
