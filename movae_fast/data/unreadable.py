"""Find the image files that cannot be read, once before training, and cache the result until the files
change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from movae_fast.data.cache import cached_on_disk
from movae_fast.data.decode import misfit, try_decode
from movae_fast.data.find_files import File, opened
from movae_fast.data.prefetch import in_threads
from movae_fast.data.sources import ImageFiles


def list_hash(files: Sequence[File]) -> str:
    """Return a digest of the files' names, sizes and modification times."""
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
    """Return the files that cannot be used, as {row: reason}: they cannot be decoded, or are smaller than the
    crop."""
    lasting = True

    def check(path: File) -> str | None:
        nonlocal lasting
        pixels = try_decode(path, source.channels)
        if isinstance(pixels, str):
            if not opens(path):  # Threads may race here, since all of them write the same value.
                lasting = False
            return pixels
        return misfit(source.box, *pixels.shape[:2]) or None

    def check_all() -> dict[int, str]:
        return {row: why for row, why in enumerate(in_threads(check, source.files)) if why is not None}

    # A file that cannot be opened today may be readable tomorrow, unchanged: such a result is not kept.
    name = f"unreadable-{list_hash(source.files)}-{source.channels}-{source.box}"
    reasons = cached_on_disk(name, check_all, lambda: lasting)
    return {int(row): why for row, why in reasons.items()}  # JSON's keys are strings.


def opens(path: File) -> bool:
    """Return whether the file can be opened for reading."""
    try:
        with opened(path):
            return True
    except OSError:
        return False
