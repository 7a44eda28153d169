"""Files on disk: their digests."""

from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def file_digest(path: Path, digest: Any) -> str:
    """The file's bytes through `digest` (`hashlib.sha256()`, …), in hexadecimal."""
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()
