"""What an image file is: a file of its own, or a stretch of a tar that answers to the same names."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar, with what the package asks of a pathlib.Path."""

    tar: Path
    path: str  # within the tar
    offset: int  # of its first byte
    size: int
    mtime_ns: int  # of the tar

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Path:
        return self.tar / self.path.rpartition("/")[0]

    def __str__(self) -> str:
        return f"{self.tar}/{self.path}"

    def read_bytes(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.read_bytes())

    def stat(self) -> Stat:
        return Stat(self.size, self.mtime_ns)


File = Path | Member


def images_below(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
