"""Image files inside tar shards, as webdataset writes them: `0001.jpg` with its class in `0001.cls` beside it.

A shard's headers are read once; from then on an image is a stretch of the shard at a known offset, and every
loader shuffles, shares and resumes it as it does a file of its own. (DALI has a reader of its own for such
shards. It shuffles within a buffer, in an order that only its own checkpoints know, and takes whole shards a
rank; the `dali` loader therefore hands DALI the same stretches instead.)
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from pathlib import Path

from movae_fast.data.fetch import first_line
from movae_fast.data.files import IMAGE_SUFFIXES, File, Member
from movae_fast.data.machine import remembered

BLOCK = 512  # what a tar consists of


def is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def tars_below(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if is_tar(p))


def images_in(paths: Iterable[Path]) -> tuple[list[File], list[int]]:
    """The images at `paths`, in order: files of their own and all that the tars hold; and their classes.

    Classes are 0 where no image has one. Raises ValueError for a tar that is damaged or compressed or holds no
    image, and for a class that is no number or missing.
    """
    images: list[File] = []
    classes: list[int | None] = []
    for path in paths:
        found: list[tuple[Member, int | None]] | list[tuple[Path, None]]
        found = index(path) if is_tar(path) else [(path, None)]
        if not found:
            raise ValueError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}): remove it or write it anew")
        images += [image for image, _ in found]
        classes += [c for _, c in found]
    if all(c is None for c in classes):
        return images, [0] * len(images)
    for image, c in zip(images, classes, strict=True):
        if c is None:
            raise ValueError(f"{image} has no class and others have: give each image a .cls file, or none")
    return images, [c for c in classes if c is not None]


def index(shard: Path) -> list[tuple[Member, int | None]]:
    """The images of a tar in their order, each with the class in its sample's .cls file, if there is one.

    Reading the headers takes 50 us each, so they are remembered until the tar changes. Raises ValueError naming
    a tar that is not whole.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise _not_whole(shard, error.strerror or type(error).__name__) from None
    key = hashlib.blake2b(f"{shard.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(), digest_size=16)
    rows = remembered(f"tar-{key.hexdigest()}", lambda: _read_headers(shard))
    return [(Member(shard, name, at, size, stat.st_mtime_ns), label) for name, at, size, label in rows]


def _read_headers(shard: Path) -> list[tuple[str, int, int, int | None]]:
    images, classes = [], {}
    try:
        with shard.open("rb") as file, tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all, a kilobyte each
                if member.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append((member.name, member.offset_data, member.size))
                elif member.name.endswith(".cls"):
                    file.seek(member.offset_data)
                    classes[_sample(member.name)] = _class(f"{shard}/{member.name}", file.read(member.size))
            file.seek(tar.offset)
            closing = file.read(BLOCK)  # zeros; tarfile stops as well where a header makes no sense
            if closing != bytes(BLOCK):
                what = "cut short" if len(closing) < BLOCK else "no header"
                raise tarfile.ReadError(f"{what} at byte {tar.offset:,}")
    except (tarfile.TarError, OSError) as error:
        raise _not_whole(shard, first_line(error)) from None
    return [(name, at, size, classes.get(_sample(name))) for name, at, size in images]


def _sample(path: str) -> str:
    """What the files of one sample share: the path up to the name's first point."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class(path: str, text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{path} is no class: {text[:20]!r}, expected one whole number") from None


def _not_whole(shard: Path, why: str) -> ValueError:
    start = b""
    if shard.is_file():
        with shard.open("rb") as file:
            start = file.read(2)
        why = why if start else "empty file"
    if start == b"\x1f\x8b":
        return ValueError(f"{shard} is compressed, which leaves no way into its middle: gunzip it")
    return ValueError(f"{shard} is not a whole tar ({why}): fetch or write it again")
