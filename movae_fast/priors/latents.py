"""Encode a split of a dataset once, into a file that later calls map into memory.

The file holds a header (JSON, padded with spaces to 4,096 bytes), the values, and the labels. Its name and
header hold the SHA-256 of the weights and of the transform of the images, so that other weights or another
transform give another file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.data import Loader
from movae_fast.files import CHUNK, naming, replacing
from movae_fast.models import LATENT_WORDS, VAE, GaussianVAE
from movae_fast.names import first_line, shown
from movae_fast.priors.codes import Grid, Grids, codes_of, grids_of
from movae_fast.training.build import make_loader
from movae_fast.training.checkpoint import digest
from movae_fast.training.config import TrainConfig

FORMAT = "movae latents 1"
BLOCK = 4096
LARGEST = 2**31 - 1  # the greatest code that a file holds
# What of a run's data settings changes an encoded image.
TRANSFORM = ("dataset", "image_size", "crop", "resize", "antialias", "normalize", "bits", "binarize")
Header = dict[str, Any]
Shown = Callable[[Iterable[Tensor], int], Iterable[Tensor]]  # passes batches on, and shows how many are done


@dataclass(frozen=True)
class Latents:
    """Hold the memory-mapped codes or posteriors of a split; rows from `images` on are those of the mirrored
    images."""

    path: Path
    header: Header
    values: np.ndarray  # [N, T] uint16 or int32 codes, or [N, 2, D] float32 means and log-variances
    labels: np.ndarray  # [N] int64

    @property
    def grids(self) -> Grids:
        """Return the maps of codes that a row consists of; () if the rows are posteriors."""
        return tuple(Grid(*grid) for grid in self.header["grids"])

    @property
    def images(self) -> int:
        """Return the number of images; each has one row, or two if it is encoded mirrored as well."""
        return int(self.header["images"])

    def tensor(self, rows: Tensor | None = None) -> Tensor:
        """Return the values of the given rows [n], or of all: codes as int64, posteriors as float32."""
        values = np.asarray(self.values if rows is None else self.values[rows.numpy()])
        return torch.from_numpy(values.astype(np.int64 if self.grids else np.float32))

    def label_tensor(self) -> Tensor:  # [N] int64
        """Return the labels of all rows."""
        return torch.from_numpy(np.array(self.labels))


@torch.no_grad()
def encoded(model: VAE, x: Tensor) -> Tensor:
    """Return what a file stores for images x [B, C, S, S].

    For a model with codes it is their sequences [B, T] int64, for others means and log-variances [B, 2, D].
    """
    if model.latents == "codebook":
        return codes_of(model, x)
    return torch.stack(model.encode(x), dim=1)


def check_encodable(model: VAE, arch: str) -> None:
    """Raise ValueError for a model with neither codes nor one vector of latents, or with more codes than a file
    can hold."""
    if model.latents == "hierarchy" or not (model.latents == "codebook" or isinstance(model, GaussianVAE)):
        raise ValueError(
            f"{arch} has {LATENT_WORDS[model.latents]}; encode takes codes or one vector of latents"
        )
    if model.latents == "codebook" and (most := max(grid.codes for grid in grids_of(model))) > LARGEST:
        raise ValueError(f"{arch} has {most:,} codes; a file holds codes below {LARGEST:,}")


def identity(trained: TrainConfig, model: VAE, split: str) -> Header:
    """Return all that an encoded file depends on: weights, transform, split, and the beta of a multi-rate
    model."""
    data = trained.data
    transform = {name: getattr(data, name) for name in TRANSFORM}
    transform["image_size"] = trained.image_shape[1]
    transform["limit"] = data.limit_train if split == "train" else data.limit_test
    transform["mirrored"] = split == "train" and (trained.info.flip if data.flip is None else bool(data.flip))
    if data.binarize in ("static", "dynamic"):
        transform["binarize_seed"] = trained.run.seed
    rates = model.rates
    beta = None if rates is None else rates.current(False, next(model.parameters())).exp().tolist()
    return {"weights": digest(model.state_dict()), "transform": transform, "split": split, "beta": beta}


def key_of(known: Header) -> str:
    """Return the SHA-256 of the dictionary that `identity` returns."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def latents_path(run: Path, known: Header) -> Path:
    """Return the path of the encoded file in the folder `run`, given the dictionary that `identity` returns."""
    return run / "encoded" / f"{known['split']}-{key_of(known)[:12]}.latents"


def encode_split(
    trained: TrainConfig,
    model: VAE,
    run: Path,
    split: str,
    device: torch.device,
    show: Shown = lambda batches, count: batches,
) -> tuple[Latents, bool]:
    """Return the latents of a split, and whether their file existed; if not, encode the split and write it.

    The split is read in order. If training mirrors images, the training split is encoded mirrored as well.
    Raises ValueError for a model that cannot be encoded, or a damaged file.
    """
    check_encodable(model, trained.model.arch)
    known = identity(trained, model, split)
    path = latents_path(run, known)
    if path.exists():
        return open_latents(path, known), True
    loader = make_loader(trained, device, split, in_order=True)
    write_latents(path, known, model, loader, show)
    return open_latents(path, known), False


def write_latents(path: Path, known: Header, model: VAE, loader: Loader, show: Shown) -> None:
    """Encode the loader's images into a new file; it gets its name only when it is complete.

    known: the dictionary that `identity` returns; show: passes batches on and shows how many are done.
    """
    grids = grids_of(model) if model.latents == "codebook" else ()
    flips = (False, True) if known["transform"]["mirrored"] else (False,)
    rows, labels = torch.arange(len(loader.source)), []
    kind: Any = np.float32
    if grids:
        kind = np.uint16 if max(grid.codes for grid in grids) <= 1 << 16 else np.int32

    def batches() -> Iterator[Tensor]:
        for flip in flips:
            for x, y in loader.take(rows):
                labels.append(y.cpu())
                yield encoded(model, x.flip(-1) if flip else x)

    count, shape, check = 0, [0], 0
    with replacing(path, durable=True) as file:
        file.write(b" " * BLOCK)
        for part in show(batches(), len(flips) * -(-len(rows) // loader.batch_size)):
            data = part.cpu().numpy().astype(kind)
            count, shape = count + len(data), list(data.shape[1:])
            check = zlib.crc32(data.tobytes(), check)
            file.write(data.tobytes())
        each = torch.cat(labels).numpy().astype(np.int64).tobytes()
        file.write(each)
        header = {
            "format": FORMAT,
            **known,
            "key": key_of(known),
            "images": len(rows),
            "shape": [count, *shape],
            "dtype": np.dtype(kind).name,
            "grids": [list(grid) for grid in grids],
            "crc32": zlib.crc32(each, check),
        }
        text = json.dumps(header | {"header_crc32": header_sum(header)}).encode()
        if len(text) >= BLOCK:
            raise ValueError(
                f"the header of {shown(path)} is longer than {BLOCK} bytes: shorten the dataset's name"
            )
        file.seek(0)
        file.write(text.ljust(BLOCK - 1) + b"\n")


def header_sum(header: Header) -> int:
    """Return the CRC-32 of a header without the entry that holds this checksum."""
    rest = {name: value for name, value in header.items() if name != "header_crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def open_latents(path: Path, known: Header | None = None) -> Latents:
    """Map an encoded file into memory after checking its checksums.

    known: the dictionary that `identity` returns for the model in use. Raises ValueError for a damaged file,
    and for one made by other weights or with another transform.
    """
    try:
        header = read_header(path)
    except Exception as error:  # damage may raise anything
        why = shown(first_line(error))[:200]
        raise ValueError(
            f"{shown(path)} is not a whole encoded file ({why}): delete it and encode again"
        ) from None
    if known is not None and header["key"] != key_of(known):
        raise ValueError(
            f"{shown(path)} is of other weights or another transform (weights {header['weights'][:12]}, here "
            f"{known['weights'][:12]}): delete it and encode again"
        )
    shape, kind = tuple(header["shape"]), np.dtype(header["dtype"])
    values = np.memmap(path, kind, "r", BLOCK, shape)
    labels = np.memmap(path, np.int64, "r", BLOCK + values.nbytes, shape[:1])
    return Latents(path, header, values, labels)


def read_header(path: Path) -> Header:
    """Return the header of an encoded file after checking its length and checksums. Raises ValueError."""
    with naming(path), path.open("rb") as file:
        header: Header = json.loads(file.read(BLOCK))
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        if header["header_crc32"] != header_sum(header):
            raise ValueError("the header differs from its checksum")
        size, kind = int(np.prod(header["shape"])), np.dtype(header["dtype"])
        expected = BLOCK + size * kind.itemsize + 8 * header["shape"][0]
        if (has := path.stat().st_size) != expected:
            raise ValueError(f"{has:,} bytes, expected {expected:,}")
        check = 0
        while part := file.read(CHUNK):
            check = zlib.crc32(part, check)
    if check != header["crc32"]:
        raise ValueError("its contents differ from their checksum")
    return header
