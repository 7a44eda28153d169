"""Which image files cannot be read: asked once, before training, and remembered until the files change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from movae_fast.data.decode import decode
from movae_fast.data.files import File
from movae_fast.data.machine import in_threads, remembered


def list_hash(files: Sequence[File]) -> str:
    """A digest of the files' names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            stat = path.stat()
            line = f"{path.parent.name}/{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            line = f"{path.name}\0missing\n"
        digest.update(line.encode())
    return digest.hexdigest()


def unreadable(files: Sequence[File], channels: int) -> dict[int, str]:
    """Row -> why, of the files that `decode` refuses."""

    def check(path: File) -> str | None:
        try:
            decode(path, channels)
        except ValueError as error:
            return str(error).partition(" is not a readable image (")[2].rpartition(");")[0]
        return None

    def bad() -> dict[int, str]:
        return {row: why for row, why in enumerate(in_threads(check, files)) if why is not None}

    # JSON's keys are strings.
    found = remembered(f"unreadable-{list_hash(files)}-{channels}", bad)
    return {int(row): why for row, why in found.items()}
