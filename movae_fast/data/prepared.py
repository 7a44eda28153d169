"""Prepared sets: images decoded once into a file of uint8 [N, C, S, S] with a JSON header, mapped afterwards.

The header is written last and says what the file must be: its shape, the transform, the list of original files
it was made from, and checksums of all of it: of blocks of images, of the labels, of the header itself. A block
is compared with its checksum when an image of it is first read. Until there is a header there are `.part`
files, from which an interrupted preparation goes on.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.datasets.catalog import DatasetInfo, Source
from movae_fast.data.datasets.factor_grids import GridImages
from movae_fast.data.fetch import first_line
from movae_fast.data.find_files import PREPARED
from movae_fast.data.prefetch import RESIDENT_SHARE, free_memory, in_threads
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.data.transforms import pick
from movae_fast.data.unreadable import list_hash, unreadable
from movae_fast.files import file_digest, locked, replacing, sync
from movae_fast.names import shown

FORMAT = "movae uint8 images 2"
OLD_FORMAT = "movae uint8 images 1"  # with one checksum of all images, none of labels
CHUNK = 1024  # images between two durable states of a preparation
# Bytes that share a checksum, in whole images. Small: a shuffled batch of B images reads B blocks at first.
BLOCK = 1 << 16


class Prepared:
    """An image source that maps a prepared file; rows are indexed on the host, or on a GPU where it fits.

    Images are compared with their checksums as they are first read, unless `verify` is False. Raises ValueError
    naming the file then.
    """

    on_host = True
    images: np.ndarray | Tensor

    def __init__(self, path: Path, header: dict[str, Any], source: Any = None, verify: bool = True) -> None:
        if hasattr(source, "factors") and not header["skipped"]:
            self.factors = source.factors
        self.path, self.header = path, header
        self.labels = torch.from_numpy(np.load(path.with_suffix(".labels.npy")))
        self.images = mapped(path, header)
        self.skipped: list[str] = header["skipped"]
        self.note = f"prepared {shown(path)}"
        if source is not None and source.note:
            self.note += f"; {source.note}"
        if header["format"] == OLD_FORMAT:
            self.note += "; without checksums of blocks, which `movae data prepare` adds"
            verify = False
        self.sums = block_sums(header) if verify else None
        # Workers of a DataLoader share it: what one has checked is checked for all, and for the next epoch's.
        self.checked = torch.zeros(
            0 if self.sums is None else len(self.sums), dtype=torch.uint8
        ).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] to images [B, C, S, S] uint8 and labels [B]."""
        if isinstance(self.images, Tensor):
            return pick(self.images, rows), self.labels[rows]
        self.check(rows)
        return torch.from_numpy(self.images[rows.numpy()]), self.labels[rows]

    def check(self, rows: Tensor) -> None:
        """Compare the blocks of `rows` [B] that were not read yet with their checksums. Raises ValueError."""
        if self.sums is None:
            return
        blocks = rows // self.header["block"]
        new = blocks[self.checked[blocks] == 0]
        if not len(new):
            return
        new = new.unique()
        if bad := damaged(self.images, self.header, self.sums, new.tolist()):
            raise ValueError(f"{shown(self.path)} is damaged ({said(bad)}): {MEND}")
        self.checked[new] = 1

    def table(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """All images and labels where they lie on a GPU."""
        return (self.images, self.labels) if isinstance(self.images, Tensor) else None

    def to(self, device: torch.device) -> None:
        """Copy the set to a GPU that has room for it; on a CPU it stays mapped."""
        source = self.images
        if device.type == "cpu" or isinstance(source, Tensor):
            return
        if source.nbytes <= RESIDENT_SHARE * free_memory(device):
            images = torch.empty(
                source.shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
            )
            for at in range(0, len(source), CHUNK):
                self.check(torch.arange(at, min(at + CHUNK, len(source))))
                images[at : at + CHUNK] = torch.from_numpy(source[at : at + CHUNK].copy())
            self.images, self.labels, self.on_host = images, self.labels.to(device), False


MEND = "prepare it again (movae data prepare), or delete it and the original files are read"


def mapped(path: Path, header: dict[str, Any]) -> np.ndarray:
    return np.memmap(path, np.uint8, "r", shape=tuple(header["shape"]))


def images_per_block(shape: list[int]) -> int:
    return max(1, BLOCK // int(np.prod(shape[1:])))


def block_sums(header: dict[str, Any]) -> np.ndarray:
    """uint32 [blocks], the CRC-32 of each block's bytes."""
    return np.frombuffer(bytes.fromhex(header["blocks_crc32"]), ">u4")


def damaged(
    images: Any, header: dict[str, Any], sums: np.ndarray, blocks: Iterable[int]
) -> list[tuple[int, int]]:
    """(first, last) image of those of `blocks` that differ from their checksums."""
    size = header["block"]
    bad = (b for b in blocks if zlib.crc32(images[b * size : (b + 1) * size]) != sums[b])
    return [(b * size, min((b + 1) * size, len(images)) - 1) for b in bad]


def said(bad: list[tuple[int, int]]) -> str:
    parts = [f"{first:,} to {last:,}" for first, last in bad[:3]]
    return f"checksums differ at images {', '.join(parts)}{', …' * (len(bad) > 3)}"


def damage(path: Path, header: dict[str, Any]) -> str:
    """What is wrong with a prepared file's images, "" if nothing is; reads all of them."""
    if header["format"] == OLD_FORMAT:
        return "" if checksum(path) == header["checksum"] else "its checksum differs"
    sums = block_sums(header)
    bad = damaged(mapped(path, header), header, sums, range(len(sums)))
    return said(bad) if bad else ""


def checksum(path: Path) -> str:
    """The checksum of all images, which headers of the old format have."""
    return file_digest(path, hashlib.blake2b(digest_size=16))


def prepared_path(name: str, options: ReadOptions) -> Path:
    folder, name = _place(name, options)
    return folder / f"{name}-{options.split}-{options.image_size}-{options.crop}-{options.resize}.u8"


def _place(name: str, options: ReadOptions) -> tuple[Path, str]:
    """The folder of a dataset's prepared files, and how their names begin."""
    root = options.root
    if os.path.isfile(root):  # a list of files
        return root.parent / PREPARED, f"{name}-{root.stem}"
    return root / PREPARED, name


def prepared_files(name: str, options: ReadOptions) -> list[Path]:
    """A split's prepared files, of whatever size and transform, whole or not."""
    folder, name = _place(name, options)
    ours = re.compile(rf"{re.escape(name)}-{options.split}-[0-9]+-[^.]*\.(u8|json)")
    beside = folder.iterdir() if folder.is_dir() else iter(())
    return sorted({path.with_suffix(".u8") for path in beside if ours.fullmatch(path.name)})


def open_split(
    info: DatasetInfo, options: ReadOptions, on_bad_image: str = "error", verify: bool = True
) -> Any:
    """A split's source: its prepared file where there is one that matches, else the original files.

    `skip` leaves unreadable image files out (`source.skipped` names them). A prepared file that is not what its
    header says is a ValueError (its images only if `verify`, as they are read); one that the original files
    have outgrown is left alone and noted.
    """
    path = prepared_path(info.name, options)
    header = read_header(path)
    try:
        source: Any = info.read(options)
    except FileNotFoundError:
        if header is None:
            raise
        return Prepared(path, header, verify=verify)  # the original files may be elsewhere by now
    if header is not None:
        same = header["files"] == list_hash(source.files) and header["transform"] == transform(source)
        if same and (header["skipped"] or labels_agree(path, source)):
            if header["skipped"] and on_bad_image == "error":
                raise ValueError(
                    f"{shown(path)} leaves out {len(header['skipped'])} unreadable images "
                    f"({shown(header['skipped'][0])}): give --on_bad_image skip, or mend them and prepare again"
                )
            return Prepared(path, header, source, verify)
        _note(source, f"{shown(path)} is out of date (the original files changed); reading those")
    elif path.exists():
        _note(source, f"{shown(path)} has no header and is not used: prepare again")
    if on_bad_image == "skip" and isinstance(source, ImageFiles):
        leave_out_unreadable(source, info.name, options)
    return source


def _note(source: Any, text: str) -> None:
    source.note = "; ".join(filter(None, (source.note, text)))


def leave_out_unreadable(source: ImageFiles, name: str, options: ReadOptions) -> None:
    source.leave_out(unreadable(source))
    if not source.files:
        raise ValueError(f"--dataset {name}: not one {options.split} image can be read ({source.skipped[0]})")


def labels_agree(path: Path, source: Source) -> bool:
    """Whether the labels of a prepared file are those of its original files now: a class folder may be new."""
    return np.array_equal(np.load(path.with_suffix(".labels.npy")), np.asarray(_labels(source), np.int64))


def transform(source: Source) -> dict[str, Any]:
    """What was done to an original image, as a header keeps it."""
    if isinstance(source, ImageFiles):
        box = list(source.box) if source.box else None
        return {"size": source.size, "resize": source.mode, "box": box, "channels": source.channels}
    assert isinstance(source, GridImages)
    return {"size": source.size, "resize": source.mode}


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a prepared file, None if there is none. Raises ValueError where the two disagree."""
    at = path.with_suffix(".json")
    if not at.is_file():
        return None
    try:
        header = json.loads(at.read_text())
        if header["format"] not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        expected = int(np.prod(header["shape"]))
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise ValueError(f"{found:,} bytes, expected {expected:,} for images {header['shape']}")
        data = path.with_suffix(".labels.npy").read_bytes()
        if header["format"] == FORMAT:
            _check_sums(header, data)
        elif absent := {"checksum", "files", "transform", "skipped"} - header.keys():
            raise ValueError(f"the header has no {', '.join(sorted(absent))}")
        labels = np.load(io.BytesIO(data)).shape
        if labels != (header["shape"][0],):
            raise ValueError(f"labels {list(labels)}, expected [{header['shape'][0]}]")
    except Exception as error:  # damage may raise anything
        why = shown(first_line(error))[:200]
        raise ValueError(
            f"{shown(path)} is not a whole prepared file ({why}): delete it and prepare again"
        ) from None
    return header


def _check_sums(header: dict[str, Any], labels: bytes) -> None:
    if sealed(header)["header_crc32"] != header["header_crc32"]:
        raise ValueError("the header differs from its checksum")
    if zlib.crc32(labels) != header["labels_crc32"]:
        raise ValueError("the labels differ from their checksum")


def sealed(header: dict[str, Any]) -> dict[str, Any]:
    """The header with the checksum of all else in it."""
    rest = {key: value for key, value in header.items() if key != "header_crc32"}
    return rest | {"header_crc32": zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


def prepare(
    info: DatasetInfo,
    options: ReadOptions,
    on_bad_image: str = "error",
    decoder: str = "pillow",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, str]:
    """Write a split's prepared file; its path and "written", "continued", "current", "given checksums" or
    "given other labels".

    Stopped at any moment, it goes on from the last whole chunk. Where another process prepares the same file,
    that one's end is awaited; `say` is called with a line on that and on what is left aside. Raises ValueError
    for a set that lies in memory anyway, an unreadable image (unless `on_bad_image` is skip), and a folder that
    cannot be written.
    """
    source = info.read(options)
    if not isinstance(source, ImageFiles | GridImages):
        raise ValueError(f"{info.name} lies in memory as uint8 once it is read: there is nothing to prepare")
    if source.note:
        say(f"{options.split}: {source.note}")
    path = prepared_path(info.name, options)
    header: dict[str, Any] = {
        "dataset": info.name,
        "split": options.split,
        "transform": transform(source),
        "decoder": decoder if isinstance(source, ImageFiles) else "none",
        "files": list_hash(source.files),
        "skipped": [],
    }
    if on_bad_image == "skip" and isinstance(source, ImageFiles):
        leave_out_unreadable(source, info.name, options)
        header["skipped"] = source.skipped
    header["shape"] = [len(source), info.channels, options.image_size, options.image_size]
    old = _current(path, header)
    if old is not None and old["format"] == FORMAT and labels_agree(path, source):
        return path, "current"
    try:
        with locked(path.with_suffix(".lock"), lambda: say(f"{path}: waiting for who prepares it already")):
            return path, _prepare(path, header, source, progress)
    except OSError as error:
        raise ValueError(
            f"{shown(path)} cannot be written ({shown(error.strerror or first_line(error))}): mend that and "
            "prepare again, which goes on from what was done"
        ) from None


def _current(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The header of the prepared file if that is whole, of these original files and made as `header` says."""
    try:
        old = read_header(path)
    except ValueError:
        return None  # written anew
    matches = old is not None and all(old.get(key) == value for key, value in header.items())
    return old if matches and old is not None and not damage(path, old) else None


def _prepare(path: Path, header: dict[str, Any], source: Any, progress: Callable[[int, int], None]) -> str:
    """What `prepare` does once no other process does it; says which of its words it was."""
    old = _current(path, header)
    header = header | {"block": images_per_block(header["shape"])}
    if old is not None:
        if old["format"] == FORMAT and labels_agree(path, source):
            return "current"
        blocks = np.split(mapped(path, old), range(header["block"], len(source), header["block"]))
        _finish(path, path, header, source, [_sum(block) for block in blocks])
        return "given checksums" if old["format"] == OLD_FORMAT else "given other labels"
    done, sums = _write_images(path, header, source, progress)
    _finish(path, path.with_suffix(".u8.part"), header, source, sums)
    path.with_suffix(".part.json").unlink()
    return "continued" if done else "written"


def _finish(path: Path, images: Path, header: dict[str, Any], source: Any, sums: list[str]) -> None:
    """Put the file at `images`, its labels and its header in their places."""
    # No header stands beside data that are not its own.
    path.with_suffix(".json").unlink(missing_ok=True)
    labels = io.BytesIO()
    np.save(labels, np.asarray(_labels(source), np.int64))
    with replacing(path.with_suffix(".labels.npy"), durable=True) as file:
        file.write(labels.getvalue())
    images.replace(path)
    whole = {"format": FORMAT} | header | {"blocks_crc32": "".join(sums)}
    whole["labels_crc32"] = zlib.crc32(labels.getvalue())
    _write_json(path.with_suffix(".json"), sealed(whole))


def _sum(block: Any) -> str:
    return f"{zlib.crc32(block):08x}"


def _write_images(
    path: Path, header: dict[str, Any], source: Any, progress: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """Append what is missing to the .part file; how many images were there, and all blocks' checksums."""
    data, state = path.with_suffix(".u8.part"), path.with_suffix(".part.json")
    item, total = int(np.prod(header["shape"][1:])), len(source)
    sums = _blocks_done(data, state, header)
    before = at = min(len(sums) * header["block"], total)
    need, free = (total - before) * item, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{need / 1e9:.3g} GB to write and {free / 1e9:.3g} GB free")
    with data.open("r+b" if sums else "wb") as file:
        file.truncate(before * item)
        file.seek(0, os.SEEK_END)
        written = 0
        progress(at, total)
        for block in _in_blocks(_decoded(source, header["decoder"], before), header["block"] * item):
            file.write(block)
            sums.append(_sum(block))
            at, written = at + len(block) // item, written + len(block) // item
            progress(at, total)
            if written >= CHUNK:
                sync(file)
                _write_json(state, {"header": header, "blocks_crc32": "".join(sums)})
                written = 0
        sync(file)
        _write_json(state, {"header": header, "blocks_crc32": "".join(sums)})
    return before, sums


def _blocks_done(data: Path, state: Path, header: dict[str, Any]) -> list[str]:
    """The checksums of the blocks that an interrupted preparation left whole."""
    try:
        earlier = json.loads(state.read_text())
        sums = [earlier["blocks_crc32"][i : i + 8] for i in range(0, len(earlier["blocks_crc32"]), 8)]
        if earlier["header"] != header:
            return []
        done = []
        with data.open("rb") as file:
            for expected in sums:
                if _sum(file.read(header["block"] * int(np.prod(header["shape"][1:])))) != expected:
                    break
                done.append(expected)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged: from the beginning
        return []
    return done


def _in_blocks(batches: Iterable[Tensor], size: int) -> Iterator[bytes]:
    """The bytes of uint8 batches, `size` at a time; the last block may be shorter."""
    held = bytearray()
    for images in batches:
        held += images.contiguous().view(-1).numpy().data
        whole = len(held) // size * size
        for at in range(0, whole, size):
            yield bytes(held[at : at + size])
        del held[:whole]
    if held:
        yield bytes(held)


def _decoded(source: Any, decoder: str, start: int) -> Iterator[Tensor]:
    """uint8 [B, C, S, S] of rows start, start + 1, …"""
    if decoder == "dali":
        from movae_fast.data.loaders.dali import DaliLoader

        loader = DaliLoader(source, 256, torch.device("cpu"), train=False)
        for _, (images, _) in loader.batches(torch.arange(start, len(source)), 0):
            yield images
    elif isinstance(source, ImageFiles):
        for image, _ in in_threads(source.__getitem__, range(start, len(source))):
            yield image[None]
    else:
        for rows in torch.arange(start, len(source)).split(CHUNK):
            yield source.gather(rows)[0]


def _labels(source: Any) -> Any:
    if isinstance(source, ImageFiles):
        return source.labels
    shape = next(i for i, name in enumerate(source.grid.names) if name.endswith("shape"))
    return source.factors(torch.arange(len(source)))[:, shape]


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with replacing(path, durable=True) as file:
        file.write(json.dumps(record, indent=1).encode())
