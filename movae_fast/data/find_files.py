"""Find image files below a folder, and give a file inside a tar the methods of a path.

Files that are found but not read are counted by reason, so that no image is left out silently.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from movae_fast.names import shown

# These are the endings of formats that Pillow decodes to one picture.
IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jfif", ".jpe", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga"),
)
PREPARED = "prepared"  # the folder of prepared files, inside the folder of the originals
PREPARED_SUFFIXES = (".u8", ".npy", ".json", ".part", ".lock")


class Stat(NamedTuple):
    """Hold the two fields of os.stat_result that this package uses, for a file in a tar."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, slots=True)
class Member:
    """Refer to one file inside a tar, with those methods of pathlib.Path that the package uses."""

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
        """Return the file's bytes."""
        with opened(self.tar) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Return the file's bytes as a stream."""
        return io.BytesIO(self.read_bytes())

    def stat(self) -> Stat:
        """Return the file's size and the tar's modification time."""
        return Stat(self.size, self.mtime_ns)


File = Path | Member


def opened(path: File) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError, also for a pipe or a device, which might never end."""
    if isinstance(path, Member):
        return path.open()
    # Opening a pipe without O_NONBLOCK waits until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        raise OSError(number, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")


@dataclass
class LeftAside:
    """Count the files in a folder or tar that are not read, by reason, with the first file's name for each
    reason."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, n: int = 1) -> None:
        """Count `n` more files under a reason; `name` is the first of them."""
        self.counts[reason] = self.counts.get(reason, 0) + n
        self.first.setdefault(reason, name)

    def __str__(self) -> str:
        """Return the counts as text for a terminal, "left aside: 3 hidden (a/.b.png, …), 1 …", or "" if there
        are none."""
        parts = (
            f"{n:,} {reason} ({shown(self.first[reason])}{', …' * (n > 1)})"
            for reason, n in self.counts.items()
        )
        return f"left aside: {', '.join(parts)}" if self.counts else ""


@dataclass
class FolderContents:
    """Hold the images and tars found below a folder, and the count of what was left aside."""

    images: list[Path]
    tars: list[Path]
    aside: LeftAside


def hidden(path: str) -> bool:
    """Return whether a component of a relative path begins with a dot, as in .ipynb_checkpoints/ and ._0.png.

    Such files are copies and notes that other programs keep beside the images.
    """
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def find_below(root: Path) -> FolderContents:
    """Find the images and tars below `root`, sorted; links to folders are followed, but no folder is read
    twice."""
    below, others = FolderContents([], [], LeftAside()), LeftAside()
    start = len(os.path.join(root, ""))
    for entry in _entries(root, below.aside):
        name, suffix = entry.path[start:], os.path.splitext(entry.name)[1].lower()
        kind = _kind(entry)
        if kind != "file" and (kind != "linked to nothing" or suffix not in IMAGE_SUFFIXES):
            below.aside.add(kind, name)
        elif suffix == ".tar":
            below.tars.append(Path(entry))
        elif suffix in IMAGE_SUFFIXES:  # `decode` says what is wrong with a broken link.
            below.images.append(Path(entry))
        elif os.path.dirname(name) != PREPARED or suffix not in PREPARED_SUFFIXES:
            others.add(shown(suffix) or "without a suffix", name)
    below.images.sort()
    below.tars.sort()
    for suffix in sorted(others.counts):
        below.aside.add(suffix, others.first[suffix], others.counts[suffix])
    return below


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "file" for a regular file or a link to one, else the reason for leaving the entry aside."""
    try:
        regular = entry.is_file() or stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return "linked to nothing"
    return "file" if regular else "neither file nor folder"


def _entries(root: Path, aside: LeftAside) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below `root` that is not a folder, and count in `aside` what is not read.

    Links to folders are followed after all real folders, unless they lead to a folder that was read or that
    contains `root`. So a cycle ends, and a link upwards does not bring test images among the training images.
    """
    start = len(os.path.join(root, ""))
    seen = {_identity(folder) for folder in root.resolve().parents}
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        identity, name = _identity(folder), folder[start:] or "."
        if identity is not None and identity in seen:
            aside.add("linked to a folder that is read already or lies above", name)
            continue
        seen.add(identity)
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            aside.add(f"unreadable: {error.strerror}", name)
            continue
        below = list[str]()
        for entry in inside:
            if entry.name.startswith("."):
                aside.add("hidden", entry.path[start:])
            elif not _is_folder(entry):
                yield entry
            else:
                (links if entry.is_symlink() else below).append(entry.path)
        folders += reversed(below)


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Return the device and inode numbers of a folder, the same for all paths to it; None if it is not
    accessible."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
