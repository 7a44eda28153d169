"""Write prepared files: the images of a split, decoded once, which later runs map into memory.

Until the header is written the data are in `.part` files, from which an interrupted preparation continues.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.datasets import DatasetInfo
from movae_fast.data.loaders.dali import DaliLoader
from movae_fast.data.prefetch import in_threads
from movae_fast.data.prepared import leave_out_unreadable
from movae_fast.data.prepared_format import (
    FORMAT,
    OLD_FORMAT,
    Header,
    Preparable,
    damage,
    header_path,
    images_per_block,
    labels_agree,
    labels_array,
    labels_path,
    map_images,
    prepared_path,
    read_header,
    sealed,
    transform,
)
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.data.unreadable import list_hash
from movae_fast.files import locked, replacing, sync
from movae_fast.names import first_line, shown

CHUNK = 1024  # images between two states that survive a loss of power


def prepare(
    info: DatasetInfo,
    options: ReadOptions,
    on_bad_image: str = "error",
    decoder: str = "pillow",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, str]:
    """Write the prepared file of a split, and return its path and what was done.

    That is "written"; "continued", from an interrupted preparation; "current", if the file was up to date;
    "given checksums", if an older file lacked them; or "given other labels". An interrupted preparation
    continues from the last complete chunk. If another process prepares the same file, this one waits for it.

    on_bad_image: "skip" leaves unreadable images out. decoder: "pillow" or "dali". progress: called with the
    numbers of images done and in total. say: called with a line on waiting, or on files that are left aside.

    Raises ValueError for a dataset that is read into memory anyway, for an unreadable image, and for a folder
    that cannot be written.
    """
    source = info.read(options)
    if not isinstance(source, Preparable):
        raise ValueError(f"{info.name} lies in memory as uint8 once it is read: there is nothing to prepare")
    if source.note:
        say(f"{options.split}: {source.note}")
    path = prepared_path(info.name, options)
    header: Header = {
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
            return path, _prepare_locked(path, header, source, progress)
    except OSError as error:
        raise ValueError(
            f"{shown(path)} cannot be written ({shown(error.strerror or first_line(error))}): mend that and "
            "prepare again, which goes on from what was done"
        ) from None


def _current(path: Path, header: Header) -> Header | None:
    """Return the header of the existing prepared file if the file is undamaged and agrees with `header`, else
    None."""
    try:
        old = read_header(path)
    except ValueError:
        return None  # The file will be written anew.
    matches = old is not None and all(old.get(key) == value for key, value in header.items())
    return old if matches and old is not None and not damage(path, old) else None


def _prepare_locked(
    path: Path, header: Header, source: Preparable, progress: Callable[[int, int], None]
) -> str:
    """Write what is missing, while this process holds the lock; return what was done, in the words of
    `prepare`."""
    old = _current(path, header)
    header = header | {"block": images_per_block(header["shape"])}
    if old is not None:
        if old["format"] == FORMAT and labels_agree(path, source):
            return "current"
        blocks = np.split(map_images(path, old), range(header["block"], len(source), header["block"]))
        _finish(path, path, header, source, [_crc(block.data) for block in blocks])
        return "given checksums" if old["format"] == OLD_FORMAT else "given other labels"
    done, sums = _write_images(path, header, source, progress)
    _finish(path, path.with_suffix(".u8.part"), header, source, sums)
    path.with_suffix(".part.json").unlink()
    return "continued" if done else "written"


def _finish(path: Path, images: Path, header: Header, source: Preparable, sums: list[str]) -> None:
    """Move the images to their final name, and write their labels and, last, their header."""
    # The old header goes first, so that no header ever stands beside data that are not its own.
    header_path(path).unlink(missing_ok=True)
    labels = io.BytesIO()
    np.save(labels, labels_array(source))
    with replacing(labels_path(path), durable=True) as file:
        file.write(labels.getvalue())
    images.replace(path)
    whole: Header = {"format": FORMAT} | header | {"blocks_crc32": "".join(sums)}
    whole["labels_crc32"] = zlib.crc32(labels.getvalue())
    _write_json(header_path(path), sealed(whole))


def _crc(block: bytes | memoryview) -> str:
    return f"{zlib.crc32(block):08x}"


def _write_images(
    path: Path, header: Header, source: Preparable, progress: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """Append the missing images to the .part file.

    Returns the number of images that it held already, and the checksums of all blocks.
    """
    data, state = path.with_suffix(".u8.part"), path.with_suffix(".part.json")
    image_bytes, total = int(np.prod(header["shape"][1:])), len(source)
    sums = _blocks_done(data, state, header)
    before = done = min(len(sums) * header["block"], total)
    need, free = (total - before) * image_bytes, shutil.disk_usage(path.parent).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{need / 1e9:.3g} GB to write and {free / 1e9:.3g} GB free")
    with data.open("r+b" if sums else "wb") as file:
        file.truncate(before * image_bytes)
        file.seek(0, os.SEEK_END)
        unsaved = 0
        progress(done, total)
        for block in _in_blocks(_decoded(source, header["decoder"], before), header["block"] * image_bytes):
            file.write(block)
            sums.append(_crc(block))
            images = len(block) // image_bytes
            done, unsaved = done + images, unsaved + images
            progress(done, total)
            if unsaved >= CHUNK:
                sync(file)
                _write_json(state, {"header": header, "blocks_crc32": "".join(sums)})
                unsaved = 0
        sync(file)
        _write_json(state, {"header": header, "blocks_crc32": "".join(sums)})
    return before, sums


def _blocks_done(data: Path, state: Path, header: Header) -> list[str]:
    """Return the checksums of the blocks that an interrupted preparation wrote completely; empty if there are
    none."""
    try:
        earlier = json.loads(state.read_text())
        sums = [earlier["blocks_crc32"][i : i + 8] for i in range(0, len(earlier["blocks_crc32"]), 8)]
        if earlier["header"] != header:
            return []
        done = []
        with data.open("rb") as file:
            for expected in sums:
                if _crc(file.read(header["block"] * int(np.prod(header["shape"][1:])))) != expected:
                    break
                done.append(expected)
    except (OSError, ValueError, KeyError, TypeError):  # There is none, or it is damaged: start anew.
        return []
    return done


def _in_blocks(batches: Iterable[Tensor], size: int) -> Iterator[bytes]:
    """Yield the bytes of batches of images in blocks of `size` bytes; the last block may be shorter."""
    held = bytearray()
    for images in batches:
        held += images.contiguous().view(-1).numpy().data
        whole = len(held) // size * size
        for at in range(0, whole, size):
            yield bytes(held[at : at + size])
        del held[:whole]
    if held:
        yield bytes(held)


def _decoded(source: Preparable, decoder: str, start: int) -> Iterator[Tensor]:
    """Yield batches of images, uint8 [B, C, S, S], for the source's rows from `start` on."""
    if decoder == "dali":
        loader = DaliLoader(source, 256, torch.device("cpu"), train=False)
        for _, (images, _) in loader.batches(torch.arange(start, len(source)), 0):
            yield images
    elif isinstance(source, ImageFiles):
        for image, _ in in_threads(source.__getitem__, range(start, len(source))):
            yield image[None]
    else:
        for rows in torch.arange(start, len(source)).split(CHUNK):
            yield source.gather(rows)[0]


def _write_json(path: Path, content: Header) -> None:
    with replacing(path, durable=True) as file:
        file.write(json.dumps(content, indent=1).encode())
