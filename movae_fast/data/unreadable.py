"""Which image files cannot be read: asked once, before training, and remembered until the files change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from movae_fast.data.decode import misfit, tried
from movae_fast.data.find_files import File, opened
from movae_fast.data.prefetch import in_threads, remembered
from movae_fast.data.sources import ImageFiles


def list_hash(files: Sequence[File]) -> str:
    """A digest of the files' names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            stat = path.stat()
            line = f"{path.parent.name}/{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            line = f"{path.name}\0missing\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()


def unreadable(source: ImageFiles) -> dict[int, str]:
    """Row -> why, of the files that every loader refuses."""
    lasting = True

    def check(path: File) -> str | None:
        nonlocal lasting
        pixels = tried(path, source.channels)
        if isinstance(pixels, str):
            if not opens(path):  # threads may only ever take it away
                lasting = False
            return pixels
        return misfit(source.box, *pixels.shape[:2]) or None

    def bad() -> dict[int, str]:
        return {row: why for row, why in enumerate(in_threads(check, source.files)) if why is not None}

    # JSON's keys are strings. A file that cannot be opened today may be readable tomorrow, unchanged.
    name = f"unreadable-{list_hash(source.files)}-{source.channels}-{source.box}"
    found = remembered(name, bad, lambda: lasting)
    return {int(row): why for row, why in found.items()}


def opens(path: File) -> bool:
    try:
        with opened(path):
            return True
    except OSError:
        return False
