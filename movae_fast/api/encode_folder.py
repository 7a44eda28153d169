"""Encode the images of a folder into one file, a batch at a time."""

from __future__ import annotations

import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from movae_fast.api.trained_model import TrainedModel
from movae_fast.data import ImageFiles, ReadOptions
from movae_fast.data.find_files import find_below
from movae_fast.data.tars import images_in
from movae_fast.data.unreadable import unreadable
from movae_fast.files import replacing
from movae_fast.models import CodebookVAE, GaussianVAE
from movae_fast.names import ArgumentError, shown

Arrays = dict[str, np.ndarray]
Progress = Callable[[Iterable[Tensor], int], Iterable[Tensor]]  # passes batches on, and shows how many are done
SUFFIXES = (".npz", ".safetensors")
# Names of NumPy's types in the header of a safetensors file.
SAFE_TYPES = {"float32": "F32", "int64": "I64"}


def images_below(model: TrainedModel, folder: Path, skip_unreadable: bool) -> ImageFiles:
    """Return an image source of all images below a folder, sorted by path; each is cropped to its central
    square and resized to the model's image size.

    If the folder has no image files but tar files, these are the images in the tar files. Raises ArgumentError
    for a folder without images and, unless `skip_unreadable`, for a file that cannot be read; with
    `skip_unreadable` such files are left out.
    """
    if not folder.is_dir():
        raise ArgumentError(f"folder {shown(folder)}: there is no such folder")
    below = find_below(folder)
    files, _ = images_in(below.images or below.tars, below.aside)
    if not files:
        aside = f" ({below.aside})" if below.aside.counts else ""
        raise ArgumentError(f"folder {shown(folder)}: no image lies below it{aside}")
    channels, size, _ = model.image_shape
    options = ReadOptions(folder, "test", size, download=False, device=torch.device("cpu"))
    source = ImageFiles(files, options, None, "bilinear", channels=channels)
    reasons = unreadable(source)
    if reasons and not skip_unreadable:
        row, why = next(iter(reasons.items()))
        raise ArgumentError(
            f"folder {shown(folder)}: {len(reasons):,} of its {len(files):,} images cannot be read, as "
            f"{shown(files[row])} ({shown(why)}); mend or remove them, or give on_bad_image skip"
        )
    source.leave_out(reasons)
    if not len(source):
        raise ArgumentError(f"folder {shown(folder)}: none of its images can be read")
    return source


def encoded_rows(model: TrainedModel, x: Tensor) -> Arrays:
    """Return the arrays that a file holds for images x [N, C, S, S], by name: `mean` and `log_variance` [N, D]
    for a Gaussian posterior, `codes` [N, *code_shape] int64 for a codebook, `latents` [N, D] for a
    hierarchy."""
    values: dict[str, Tensor]
    if isinstance(model.network, GaussianVAE):
        mean, log_variance = model.posterior(x)
        values = {"mean": mean, "log_variance": log_variance}
    elif isinstance(model.network, CodebookVAE):
        values = {"codes": model.quantize(model.encode(x)).indices}
    else:
        values = {"latents": model.encode(x)}
    return {name: value.cpu().numpy() for name, value in values.items()}


def encode_folder(
    model: TrainedModel,
    folder: Path,
    out: Path,
    batch_size: int = 256,
    skip_unreadable: bool = False,
    progress: Progress = lambda batches, count: batches,
) -> tuple[int, list[str]]:
    """Encode all images below `folder` into one file `out`, .npz or .safetensors; return the number of images
    in it, and the files that were left out, each with the reason.

    The file has the arrays of `encoded_rows`, one row per image, and the images' paths relative to the folder
    in the same order: as an array `files` in an .npz, as a JSON list `files` in the metadata of a .safetensors.
    Memory holds one batch at a time. The file appears only when it is complete.

    batch_size: images per forward pass. skip_unreadable: leave out files that cannot be read. progress: is
    given the batches and their number, and returns the batches; a place for a progress bar. Raises
    ArgumentError for another suffix, for a file `out` that exists, and as `images_below`.
    """
    if out.suffix not in SUFFIXES:
        raise ArgumentError(f"out {shown(out)}: give a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise ArgumentError(f"out {shown(out)} exists and is not overwritten; name another file")
    source = images_below(model, folder, skip_unreadable)
    names = [str(file).removeprefix(f"{folder}/") for file in source.files]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as inside:
        arrays = fill(model, source, Path(inside), batch_size, progress)
        with replacing(out, durable=True) as file:
            (write_npz if out.suffix == ".npz" else write_safetensors)(file, arrays, names)
    return len(source), list(source.skipped)


def fill(model: TrainedModel, source: ImageFiles, inside: Path, batch_size: int, progress: Progress) -> Arrays:
    """Encode a source's images, a batch at a time, and return the arrays of `encoded_rows`, memory-mapped from
    files in the folder `inside`."""
    arrays: Arrays = {}
    rows = torch.arange(len(source)).split(batch_size)
    for batch in progress(iter(rows), len(rows)):
        images, _ = source.gather(batch)
        for name, values in encoded_rows(model, images).items():
            if name not in arrays:
                shape = (len(source), *values.shape[1:])
                arrays[name] = np.memmap(inside / name, values.dtype, "w+", shape=shape)
            arrays[name][int(batch[0]) : int(batch[-1]) + 1] = values
    return arrays


def write_npz(file: IO[bytes], arrays: Arrays, names: list[str]) -> None:
    """Write arrays and the images' names as NumPy's .npz, uncompressed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, values in {**arrays, "files": np.array(names)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = np.lib.format.header_data_from_array_1_0(values)
                np.lib.format.write_array_header_2_0(member, header)
                for part in parts(values):
                    member.write(part)


def write_safetensors(file: IO[bytes], arrays: Arrays, names: list[str]) -> None:
    """Write arrays, and the images' names as metadata, in the safetensors format: a length, a JSON header, the
    values."""
    header: dict[str, object] = {"__metadata__": {"files": json.dumps(names)}}
    end = 0
    for name, values in arrays.items():
        begin, end = end, end + values.nbytes
        kind = SAFE_TYPES[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for values in arrays.values():
        for part in parts(values):
            file.write(part)


def parts(values: np.ndarray, rows: int = 4096) -> Iterator[bytes]:
    """Yield an array's bytes, `rows` rows at a time."""
    for first in range(0, len(values), rows):
        yield values[first : first + rows].tobytes()
