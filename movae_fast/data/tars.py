"""Image files inside tar shards, as webdataset writes them: `0001.jpg` with its class in `0001.cls` beside it.

A shard's headers are read once; from then on an image is a stretch of the shard at a known offset, and every
loader shuffles, shares and resumes it as it does a file of its own. (DALI has a reader of its own for such
shards. It shuffles within a buffer, in an order that only its own checkpoints know, and takes whole shards a
rank; the `dali` loader therefore hands DALI the same stretches instead.)
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
from typing import Any

from movae_fast.data.fetch import first_line
from movae_fast.data.find_files import IMAGE_SUFFIXES, Aside, File, Member, hidden, opened
from movae_fast.data.prefetch import remembered
from movae_fast.names import shown

BLOCK = 512  # what a tar consists of
MAX_LINKS = 40  # from one to the next, as Linux counts them


def is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def images_in(paths: Iterable[Path], aside: Aside | None = None) -> tuple[list[File], list[int]]:
    """The images at `paths`, in order: files of their own and all that the tars hold; and their classes.

    Classes are 0 where no image has one. What else the tars hold is added to `aside`. Raises ValueError for a
    tar that is damaged or compressed or holds no image, and for a class that is no number or missing.
    """
    images: list[File] = []
    classes: list[int | None] = []
    for path in paths:
        found: list[tuple[Member, int | None]] | list[tuple[Path, None]]
        found = index(path, aside) if is_tar(path) else [(path, None)]
        if not found:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{shown(path)} holds no image ({kinds}): remove it or write it anew")
        images += [image for image, _ in found]
        classes += [c for _, c in found]
    if all(c is None for c in classes):
        return images, [0] * len(images)
    for image, c in zip(images, classes, strict=True):
        if c is None:
            raise ValueError(
                f"{shown(image)} has no class and others have: give each image a .cls file, or none"
            )
    return images, [c for c in classes if c is not None]


def index(shard: Path, aside: Aside | None = None) -> list[tuple[Member, int | None]]:
    """The images of a tar in their order, each with the class in its sample's .cls file, if there is one.

    Links to files in the tar are those files. What is no image is added to `aside`. Reading the headers takes
    50 us each, so they are remembered until the tar changes. Raises ValueError naming a tar that is not whole.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise _not_whole(shard, error.strerror or type(error).__name__) from None
    state = f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
    key = hashlib.blake2b(os.fsencode(shard.resolve()) + state, digest_size=16)
    found = remembered(f"tar-2-{key.hexdigest()}", lambda: _read_headers(shard))
    if aside is not None:
        for reason, name, n in found["aside"]:
            aside.add(reason, f"{shard.name}/{name}", n)
    return [
        (Member(shard, name, at, size, stat.st_mtime_ns), label) for name, at, size, label in found["images"]
    ]


@dataclass
class _Contents:
    """A tar's members by what they are to us; names within the tar."""

    images: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    stretches: dict[str, tuple[int, int]] = field(default_factory=dict)  # normalised name -> offset, size
    links: dict[str, str] = field(default_factory=dict)  # normalised name -> normalised name
    aside: Aside = field(default_factory=Aside)

    def stretch(self, name: str) -> tuple[int, int] | None:
        """Where the file of this name, or the one that it links to, lies."""
        name = posixpath.normpath(name)
        for _ in range(MAX_LINKS):
            if name in self.stretches or name not in self.links:
                break
            name = self.links[name]
        return self.stretches.get(name)


def _read_headers(shard: Path) -> dict[str, Any]:
    """{"images": [name, offset, size, class or None] of each, "aside": [reason, first name, count] of each}."""
    found, labels, rows = _Contents(), {}, []
    try:
        with opened(shard) as file, opened(shard) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all, a kilobyte each
                _add(found, member, shard)
            file.seek(tar.offset)
            closing = file.read(BLOCK)  # zeros; tarfile stops as well where a header makes no sense
            if closing != bytes(BLOCK):
                what = "cut short" if len(closing) < BLOCK else "no header"
                raise tarfile.ReadError(f"{what} at byte {tar.offset:,}")
            for name in found.classes:
                at, size = found.stretch(name) or (0, 0)  # a link into nowhere holds no number
                file.seek(at)
                labels[_sample(name)] = _class(f"{shard}/{name}", file.read(size))
    except (tarfile.TarError, OSError) as error:
        raise _not_whole(shard, first_line(error)) from None
    for name in found.images:
        if stretch := found.stretch(name):
            rows.append((name, *stretch, labels.get(_sample(name))))
        else:
            found.aside.add("linked to nothing in the tar", name)
    aside = [(reason, found.aside.first[reason], n) for reason, n in found.aside.counts.items()]
    return {"images": rows, "aside": aside}


def _add(found: _Contents, member: tarfile.TarInfo, shard: Path) -> None:
    """Put a member where it belongs."""
    name, suffix = member.name, posixpath.splitext(member.name)[1]
    key = posixpath.normpath(name)
    wanted = found.images if suffix.lower() in IMAGE_SUFFIXES else found.classes if suffix == ".cls" else None
    if member.isdir():
        return
    if member.islnk():
        found.links[key] = posixpath.normpath(member.linkname)
    elif member.issym():
        found.links[key] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    elif member.isfile():
        if wanted is not None and member.issparse():
            raise ValueError(
                f"{shown(shard)}/{shown(name)} is stored with holes: write the tar without --sparse"
            )
        found.stretches[key] = (member.offset_data, member.size)
    else:
        found.aside.add("neither file nor folder", name)
        return
    if hidden(name):
        found.aside.add("hidden", name)
    elif wanted is not None:
        wanted.append(name)
    elif key in found.links:
        found.aside.add("linked", name)
    else:
        found.aside.add(shown(suffix) or "without a suffix", name)


def _sample(path: str) -> str:
    """What the files of one sample share: the path up to the name's first point."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class(path: str, text: bytes) -> int:
    number = text.removeprefix(b"\xef\xbb\xbf").strip()  # editors of Windows begin with a mark
    # 19 digits may still be more than int64 holds, which is what labels are kept in.
    if not re.fullmatch(rb"[+-]?[0-9]{1,19}", number) or not -(2**63) <= int(number) < 2**63:
        raise ValueError(
            f"{shown(path)} is no class: {text[:20]!r}, expected one whole number of at most 64 bits"
        )
    return int(number)


def _not_whole(shard: Path, why: str) -> ValueError:
    start = b""
    with suppress(OSError), opened(shard) as file:
        start = file.read(2)
        why = why if start else "empty file"
    if start == b"\x1f\x8b":
        return ValueError(f"{shown(shard)} is compressed, which leaves no way into its middle: gunzip it")
    return ValueError(f"{shown(shard)} is not a whole tar ({shown(why)}): fetch or write it again")
