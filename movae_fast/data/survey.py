"""Which image files cannot be read: asked once, before training, and remembered until the files change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from movae_fast.data.decode import decode
from movae_fast.data.machine import in_threads
from movae_fast.files import replacing


def list_hash(files: Sequence[Path]) -> str:
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


def unreadable(files: Sequence[Path], channels: int) -> dict[int, str]:
    """Row -> why, of the files that `decode` refuses."""
    cache = _cache_folder() / f"unreadable-{list_hash(files)}-{channels}.json"
    if cache.is_file():
        return {int(row): why for row, why in json.loads(cache.read_text()).items()}

    def check(path: Path) -> str | None:
        try:
            decode(path, channels)
        except ValueError as error:
            return str(error).partition(" is not a readable image (")[2].rpartition(");")[0]
        return None

    answers = in_threads(check, files)
    bad = {row: why for row, why in enumerate(answers) if why is not None}
    try:
        with replacing(cache) as file:
            file.write(json.dumps(bad).encode())
    except OSError:
        pass  # a home that cannot be written costs time, not the run
    return bad


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "movae"
