"""Download the files that torchvision does not: resumable, and checked before they get their final names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from movae_fast.files import CHUNK, file_digest


@dataclass(frozen=True)
class Remote:
    """Describe a file that can be downloaded: its address, size in bytes and SHA-256."""

    url: str
    size: int
    sha256: str


def fetch(remote: Remote, path: Path) -> None:
    """Download a file to `path`, continuing from the .part file that an interrupted attempt left.

    Raises OSError if the network or the disk fails, or if the file is not the expected one.
    """
    import urllib.request  # a twentieth of a second, and most runs fetch nothing

    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    if done > remote.size:
        part.unlink()
        done = 0
    if done < remote.size:
        request = urllib.request.Request(remote.url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            # A server that does not know ranges sends the whole file again.
            mode = "ab" if answer.status == 206 else "wb"
            with part.open(mode) as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
    if part.stat().st_size != remote.size:
        raise OSError(f"{part} has {part.stat().st_size:,} bytes of {remote.size:,}; run again to continue")
    if (digest := file_digest(part, hashlib.sha256())) != remote.sha256:
        part.unlink()
        raise OSError(f"{remote.url}: SHA-256 is {digest}, expected {remote.sha256}; the download was removed")
    part.replace(path)
