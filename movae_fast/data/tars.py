"""Find image files inside tars in webdataset's layout: `0001.jpg`, with its class in `0001.cls` beside it.

A tar's headers are read once. Afterwards an image is a range of bytes in the tar, and every loader shuffles,
splits and resumes over such ranges as over files. (DALI has its own reader for such tars, but it shuffles
within a buffer, in an order that only DALI's checkpoints know, and gives each process whole tars. The `dali`
loader therefore reads the ranges itself and passes their bytes to DALI.)
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from movae_fast.data.cache import cached_on_disk
from movae_fast.data.find_files import IMAGE_SUFFIXES, File, LeftAside, Member, hidden, opened
from movae_fast.names import first_line, shown

BLOCK = 512  # bytes; a tar consists of such blocks
MAX_LINKS = 40  # the longest chain of links that is followed, which is also Linux's limit


def is_tar(path: Path) -> bool:
    """Return whether a file's name ends like that of a tar."""
    return path.suffix.lower() == ".tar"


def images_in(paths: Iterable[Path], aside: LeftAside | None = None) -> tuple[list[File], list[int]]:
    """Return the images at `paths` and their classes, in order; a tar is replaced by the images in it.

    All classes are 0 if no image has one. Other files in the tars are counted in `aside`. Raises ValueError for
    a tar that is damaged, compressed or without images, for a class that is not a number, and for an image
    without a class among images with one.
    """
    images: list[File] = []
    classes: list[int | None] = []
    for path in paths:
        inside: list[tuple[Member, int | None]] | list[tuple[Path, None]]
        inside = index(path, aside) if is_tar(path) else [(path, None)]
        if not inside:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{shown(path)} holds no image ({kinds}): remove it or write it anew")
        images += [image for image, _ in inside]
        classes += [c for _, c in inside]
    if all(c is None for c in classes):
        return images, [0] * len(images)
    for image, c in zip(images, classes, strict=True):
        if c is None:
            raise ValueError(
                f"{shown(image)} has no class and others have: give each image a .cls file, or none"
            )
    return images, [c for c in classes if c is not None]


def index(shard: Path, aside: LeftAside | None = None) -> list[tuple[Member, int | None]]:
    """Return the images in a tar, in order, each with the class from its .cls file, or None without one.

    Links inside the tar stand for the files that they lead to. Members that are not images are counted in
    `aside`. Reading a header takes 50 us, so the headers are cached on disk until the tar changes. Raises
    ValueError, which names the tar, if it is damaged.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise _not_whole(shard, error.strerror or type(error).__name__) from None
    state = f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    key = hashlib.blake2b(os.fsencode(shard.resolve()) + state, digest_size=16)
    headers = cached_on_disk(f"tar-2-{key.hexdigest()}", lambda: _read_headers(shard))
    if aside is not None:
        for reason, name, n in headers["aside"]:
            aside.add(reason, f"{shard.name}/{name}", n)
    return [
        (Member(shard, name, at, size, stat.st_mtime_ns), label) for name, at, size, label in headers["images"]
    ]


class _Headers(TypedDict):
    """Describe the contents of a tar's headers as they are stored in the cache."""

    images: list[tuple[str, int, int, int | None]]  # name, offset, size in bytes, class
    aside: list[tuple[str, str, int]]  # reason, first name, count


@dataclass
class _Contents:
    """Hold the members of a tar, sorted by kind; all names are names within the tar."""

    images: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # normalised name -> offset, size in bytes
    links: dict[str, str] = field(default_factory=dict)  # normalised name -> normalised name
    aside: LeftAside = field(default_factory=LeftAside)

    def range_of(self, name: str) -> tuple[int, int] | None:
        """Return offset and size of the file with this name, following links; None if there is no such file."""
        name = posixpath.normpath(name)
        for _ in range(MAX_LINKS):
            if name in self.ranges or name not in self.links:
                break
            name = self.links[name]
        return self.ranges.get(name)


def _read_headers(shard: Path) -> _Headers:
    """Read all headers of a tar, and the classes in its .cls files. Raises ValueError for a damaged tar."""
    contents, labels, images = _Contents(), {}, list[tuple[str, int, int, int | None]]()
    try:
        with opened(shard) as file, opened(shard) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # Otherwise tarfile keeps them all, a kilobyte each.
                _add(contents, member, shard)
            file.seek(tar.offset)
            closing = file.read(BLOCK)  # zeros at the end of a tar; tarfile also stops at a senseless header
            if closing != bytes(BLOCK):
                what = "cut short" if len(closing) < BLOCK else "no header"
                raise tarfile.ReadError(f"{what} at byte {tar.offset:,}")
            for name in contents.classes:
                at, size = contents.range_of(name) or (0, 0)  # A link to nothing reads as an empty file.
                file.seek(at)
                labels[_sample(name)] = _class(f"{shard}/{name}", file.read(size))
    except (tarfile.TarError, OSError) as error:
        raise _not_whole(shard, first_line(error)) from None
    for name in contents.images:
        if extent := contents.range_of(name):
            images.append((name, *extent, labels.get(_sample(name))))
        else:
            contents.aside.add("linked to nothing in the tar", name)
    aside = [(reason, contents.aside.first[reason], n) for reason, n in contents.aside.counts.items()]
    return {"images": images, "aside": aside}


def _add(contents: _Contents, member: tarfile.TarInfo, shard: Path) -> None:
    """Add a member of a tar to the images, the classes, the links or the files left aside."""
    name, suffix = member.name, posixpath.splitext(member.name)[1]
    key = posixpath.normpath(name)
    wanted = None
    if suffix.lower() in IMAGE_SUFFIXES:
        wanted = contents.images
    elif suffix == ".cls":
        wanted = contents.classes
    if member.isdir():
        return
    if member.islnk():
        contents.links[key] = posixpath.normpath(member.linkname)
    elif member.issym():
        contents.links[key] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    elif member.isfile():
        if wanted is not None and member.issparse():
            raise ValueError(
                f"{shown(shard)}/{shown(name)} is stored with holes: write the tar without --sparse"
            )
        contents.ranges[key] = (member.offset_data, member.size)
    else:
        contents.aside.add("neither file nor folder", name)
        return
    if hidden(name):
        contents.aside.add("hidden", name)
    elif wanted is not None:
        wanted.append(name)
    elif key in contents.links:
        contents.aside.add("linked", name)
    else:
        contents.aside.add(shown(suffix) or "without a suffix", name)


def _sample(path: str) -> str:
    """Return the common part of the names of a sample's files: the path up to the first dot in the file's
    name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class(path: str, text: bytes) -> int:
    """Return the class number in a .cls file. Raises ValueError, which names the file, if there is none."""
    number = text.removeprefix(b"\xef\xbb\xbf").strip()  # Windows' editors begin with this mark.
    # Labels are int64, and 19 digits may be more than that holds.
    if not re.fullmatch(rb"[+-]?[0-9]{1,19}", number) or not -(2**63) <= int(number) < 2**63:
        raise ValueError(
            f"{shown(path)} is no class: {text[:20]!r}, expected one whole number of at most 64 bits"
        )
    return int(number)


def _not_whole(shard: Path, why: str) -> ValueError:
    """Return the ValueError for a tar that cannot be read; it says if the tar is compressed or empty."""
    start = b""
    with suppress(OSError), opened(shard) as file:
        start = file.read(2)
        why = why if start else "empty file"
    if start == b"\x1f\x8b":
        return ValueError(f"{shown(shard)} is compressed, which leaves no way into its middle: gunzip it")
    return ValueError(f"{shown(shard)} is not a whole tar ({shown(why)}): fetch or write it again")
