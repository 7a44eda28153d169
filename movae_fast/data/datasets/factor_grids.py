"""Sets whose images are a full grid of ground-truth factors: dSprites, 3D Shapes, MPI3D; and 3DIdent.

Image number i has the factor values of i written in the factors' sizes, the last factor fastest. The sets have
no splits of their own: one fixed shuffle, its last 10,000 images (at most a tenth) for testing.
"""

from __future__ import annotations

import math
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.fetch import Remote, fetch, first_line
from movae_fast.data.find_files import found_below
from movae_fast.data.sources import ImageFiles, ReadOptions, missing
from movae_fast.data.transforms import resize
from movae_fast.names import shown

N_TEST = 10_000


@dataclass(frozen=True)
class Grid:
    """One file of images over a grid of factors."""

    filename: str
    member: str  # what the images are called in the file
    image: tuple[int, ...]  # shape of one
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    home: str  # where the file is published
    scale: int = 1  # stored values times this are grey levels
    remote: Remote | None = None

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def files(self) -> str:
        return f"{self.filename} from {self.home}"


_MPI3D = {
    "member": "images",
    "image": (64, 64, 3),
    "names": ("object_color", "object_shape", "object_size", "camera_height", "background", "axis_1", "axis_2"),
    "sizes": (6, 6, 2, 3, 3, 40, 40),
    "home": "https://github.com/rr-learning/disentanglement_dataset",
}
GRIDS = {
    "dsprites": Grid(
        "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        "imgs",
        (64, 64),
        ("color", "shape", "scale", "orientation", "pos_x", "pos_y"),
        (1, 3, 6, 40, 32, 32),
        "https://github.com/google-deepmind/dsprites-dataset",
        scale=255,
    ),
    "shapes3d": Grid(
        "3dshapes.h5",
        "images",
        (64, 64, 3),
        ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"),
        (10, 10, 10, 8, 4, 15),
        "https://storage.googleapis.com/3d-shapes/3dshapes.h5",
        remote=Remote(
            "https://storage.googleapis.com/3d-shapes/3dshapes.h5",
            267_573_662,
            "0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785",
        ),
    ),
    "mpi3d_toy": Grid("mpi3d_toy.npz", **_MPI3D),  # type: ignore[arg-type]
    "mpi3d_realistic": Grid("mpi3d_realistic.npz", **_MPI3D),  # type: ignore[arg-type]
    "mpi3d_real": Grid("mpi3d_real.npz", **_MPI3D),  # type: ignore[arg-type]
}
# Arrays that are in use: the two splits of a set share one.
_LOADED: weakref.WeakValueDictionary[tuple[str, int], np.ndarray] = weakref.WeakValueDictionary()


class GridImages:
    """One split of a grid: `rows` of the file's images, loaded at the first use. Labels are the shapes."""

    def __init__(self, path: Path, grid: Grid, rows: Tensor, options: ReadOptions) -> None:
        self.path, self.grid, self.rows = path, grid, rows
        self.size, self.mode = options.image_size, options.resize
        self.files, self.note = [path], ""
        self._images: Tensor | None = None  # [N or len(rows), H, W(, 3)] as in the file
        self._at = rows  # where in _images
        shape = next(i for i, name in enumerate(grid.names) if name.endswith("shape"))
        self._labels = factors_of(rows, grid.sizes)[:, shape]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Tensor:
        if self._images is None:
            self._images = torch.from_numpy(_load(self.path, self.grid))
        return self._images

    def to(self, device: torch.device) -> None:
        if device.type != "cpu" and self._at is self.rows:  # once: then they lie there, in the split's order
            self._images = self.images.index_select(0, self.rows).to(device)
            self._at = torch.arange(len(self.rows), device=device)
            self._labels = self._labels.to(device)

    def factors(self, rows: Tensor) -> Tensor:
        """Rows [B] of this split to factor values [B, F] int64."""
        return factors_of(self.rows[rows.cpu()], self.grid.sizes)

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B] to images [B, C, S, S] uint8 and shapes [B]."""
        rows = rows.to(self._at.device)
        images = self.images.index_select(0, self._at[rows])
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return resize(images * self.grid.scale, self.size, self.mode), self._labels[rows]


def factors_of(index: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Positions [B] in a grid to factor values [B, F] int64."""
    values = []
    for size in reversed(sizes):
        values.append(index % size)
        index = index // size
    return torch.stack(values[::-1], dim=1)


def split_rows(n: int, split: str) -> Tensor:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    test = min(N_TEST, n // 10)
    return order[n - test :] if split == "test" else order[: n - test]


def grid_reader(name: str) -> Callable[[ReadOptions], GridImages]:
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
        except Exception as error:  # zip, npy and HDF5 readers each have errors of their own
            raise missing(name, grid.files, options, f"({path.name}: {first_line(error)})") from None
        expected = (grid.size, *grid.image)
        if shape != expected or dtype != np.uint8:
            found = f"{path.name} holds {grid.member} {list(shape)} {dtype}, expected {list(expected)} uint8"
            raise missing(name, grid.files, options, f"({found})")
        return GridImages(path, grid, split_rows(grid.size, options.split), options)

    return read


def _header(path: Path, member: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array called `member`, without reading it."""
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
    key = (str(path.resolve()), path.stat().st_mtime_ns)
    found = _LOADED.get(key)
    if found is None:
        try:
            if path.suffix == ".h5":
                import h5py

                with h5py.File(path) as file:
                    found = file[grid.member][:]
            else:
                with np.load(path) as archive:
                    found = archive[grid.member]
        except Exception as error:
            raise ValueError(
                f"{shown(path)} is damaged ({first_line(error)}): fetch it again from {grid.home}"
            ) from None
        _LOADED[key] = found
    return found


IDENT3D_NAMES = (
    *("pos_x", "pos_y", "pos_z", "rotation_1", "rotation_2", "rotation_3"),
    *("hue_1", "hue_2", "spotlight_position", "hue_3"),
)
IDENT3D_FILES = (
    "3dident/train/raw_latents.npy, 3dident/train/images/*.png and the same in 3dident/test, "
    "from https://zenodo.org/records/4502485"
)


class IdentImages(ImageFiles):
    """3DIdent: image files with continuous factors [N, 10]."""

    latents: Tensor

    def factors(self, rows: Tensor) -> Tensor:
        """Rows [B] to factor values [B, 10] float32; they are continuous."""
        return self.latents[rows.cpu()]

    def keep(self, rows: list[int]) -> None:
        self.latents = self.latents[torch.tensor(rows, dtype=torch.long)]
        super().keep(rows)


def read_ident3d(options: ReadOptions) -> IdentImages:
    folders = [options.root / d / options.split for d in ("3dident", "ident3d", "3DIdent", ".")]
    folder = next((f for f in folders if (f / "raw_latents.npy").is_file()), None)
    if folder is None:
        raise missing("ident3d", IDENT3D_FILES, options, "It is not downloaded by this program.")
    try:
        latents = np.load(folder / "raw_latents.npy")
    except Exception as error:  # numpy raises ValueError, EOFError, UnpicklingError
        found = f"({folder / 'raw_latents.npy'}: {first_line(error)})"
        raise missing("ident3d", IDENT3D_FILES, options, found) from None
    if latents.ndim != 2 or latents.shape[1] != len(IDENT3D_NAMES):
        found = f"(raw_latents.npy is {list(latents.shape)}, expected [N, {len(IDENT3D_NAMES)}])"
        raise missing("ident3d", IDENT3D_FILES, options, found)
    # Image numbers are padded with zeros to one width.
    below = found_below(folder / "images")
    files = below.images
    if len(files) != len(latents):
        found = f"({len(files)} images and {len(latents)} rows of latents in {folder})"
        raise missing("ident3d", IDENT3D_FILES, options, found)
    source = IdentImages(files, options, None, "bilinear" if options.resize == "auto" else options.resize)
    source.latents = torch.from_numpy(latents).float()
    source.note = str(below.aside)
    return source
