"""Read the datasets that have one image for every combination of ground-truth factors: dSprites, 3D Shapes,
MPI3D.

The factor values of image number i are the digits of i in the mixed base of the factors' sizes; the last factor
varies fastest. These datasets have no published splits: they are shuffled once in a fixed order, and the last
10,000 images (at most a tenth of all) are the test split.
"""

from __future__ import annotations

import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.datasets.facts import GRIDS, N_TEST, Grid
from movae_fast.data.datasets.info import missing
from movae_fast.data.fetch import fetch
from movae_fast.data.sources import ImageSource, ReadOptions
from movae_fast.data.transforms import resize
from movae_fast.names import first_line, shown

# These arrays are in use. The two splits of a set share one.
_LOADED: weakref.WeakValueDictionary[tuple[str, int], np.ndarray] = weakref.WeakValueDictionary()


class GridImages(ImageSource):
    """Hold one split of such a dataset: the images `rows` of a file, which is loaded at the first use. Labels
    are the values of the shape factor."""

    def __init__(
        self,
        path: Path,
        grid: Grid,
        rows: Tensor,  # [N], the images' numbers in the file
        options: ReadOptions,
    ) -> None:
        self.path, self.grid, self.rows = path, grid, rows
        self.size, self.mode = options.image_size, options.resize
        self.files, self.note = [path], ""
        self._images: Tensor | None = None  # [grid.size or N, H, W(, 3)] as in the file
        self._places = rows  # [N], the images' places in _images
        self.labels = factors_of(rows, grid.sizes)[:, grid.shape_column]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Tensor:  # [grid.size or N, H, W(, 3)] uint8
        """Return the array of images in memory, loading the file at the first use."""
        if self._images is None:
            self._images = torch.from_numpy(_load(self.path, self.grid))
        return self._images

    def to(self, device: torch.device) -> None:
        """Copy the split's images to a GPU, in the split's order; on a CPU both splits share the file's whole
        array."""
        if device.type != "cpu" and self._places is self.rows:  # not copied yet
            self._images = self.images.index_select(0, self.rows).to(device)
            self._places = torch.arange(len(self.rows), device=device)
            self.labels = self.labels.to(device)

    def factors(self, rows: Tensor) -> Tensor:
        """Return the factor values [B, F] int64 of the given rows [B] of this split."""
        return factors_of(self.rows[rows.cpu()], self.grid.sizes)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images [B, C, S, S] of `rows`, resized, and their values of the shape factor [B]."""
        rows = rows.to(self._places.device)
        images = self.images.index_select(0, self._places[rows])
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return resize(images * self.grid.scale, self.size, self.mode), self.labels[rows]


def factors_of(index: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the factor values [B, F] int64 of the images numbered `index` [B]; `sizes` is the number of values
    of each factor."""
    values = []
    for size in reversed(sizes):
        values.append(index % size)
        index = index // size
    return torch.stack(values[::-1], dim=1)


def split_rows(n: int, split: str) -> Tensor:  # int64
    """Return which of n images belong to the "train" or "test" split, in the split's order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    test = min(N_TEST, n // 10)
    return order[n - test :] if split == "test" else order[: n - test]


def grid_reader(name: str) -> Callable[[ReadOptions], GridImages]:
    """Return the function that reads a split of the dataset `name`; it downloads the file if that is allowed
    and possible."""

    def read(options: ReadOptions) -> GridImages:
        grid = GRIDS[name]
        places = [options.root / grid.filename, *(options.root / d / grid.filename for d in (name, "mpi3d"))]
        path = next((p for p in places if p.is_file()), None)
        if path is None and options.download and grid.remote is not None:
            try:
                fetch(grid.remote, places[0])
            except OSError as error:
                raise missing(name, grid.files, options, f"Downloading failed: {first_line(error)}") from None
            path = places[0]
        if path is None:
            raise missing(name, grid.files, options, "It is not downloaded by this program." * options.download)
        try:
            shape, dtype = _header(path, grid.member)
        except Exception as error:  # The readers of zip, npy and HDF5 each have their own errors.
            raise missing(name, grid.files, options, f"({path.name}: {first_line(error)})") from None
        expected = (grid.size, *grid.image)
        if shape != expected or dtype != np.uint8:
            why = f"{path.name} holds {grid.member} {list(shape)} {dtype}, expected {list(expected)} uint8"
            raise missing(name, grid.files, options, f"({why})")
        return GridImages(path, grid, split_rows(grid.size, options.split), options)

    return read


def _header(path: Path, member: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of the array `member` in a .npz or .h5 file, without reading the array."""
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            return tuple(file[member].shape), file[member].dtype
    with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _load(path: Path, grid: Grid) -> np.ndarray:
    """Return the array of images in a file, shared with the other split if that has loaded it. Raises
    ValueError for a damaged file."""
    key = (str(path.resolve()), path.stat().st_mtime_ns)
    images = _LOADED.get(key)
    if images is None:
        try:
            if path.suffix == ".h5":
                import h5py

                with h5py.File(path) as file:
                    images = file[grid.member][:]
            else:
                with np.load(path) as archive:
                    images = archive[grid.member]
        except Exception as error:
            raise ValueError(
                f"{shown(path)} is damaged ({first_line(error)}): fetch it again from {grid.home}"
            ) from None
        _LOADED[key] = images
    return images
