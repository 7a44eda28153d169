"""Read 3DIdent: image files with ten continuous ground-truth factors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from movae_fast.data.datasets.facts import IDENT3D_FILES, IDENT3D_NAMES
from movae_fast.data.datasets.info import missing
from movae_fast.data.find_files import find_below
from movae_fast.data.sources import ImageFiles, ReadOptions
from movae_fast.names import first_line


class Ident3D(ImageFiles):
    """Decode 3DIdent's image files, and provide the ten factor values of each image."""

    latents: Tensor  # [N, 10] float32

    def factors(self, rows: Tensor) -> Tensor:
        """Return the factor values [B, 10] float32, which are continuous, of the given rows [B]."""
        return self.latents[rows.cpu()]

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows, in this order."""
        self.latents = self.latents[torch.tensor(rows, dtype=torch.long)]
        super().keep(rows)


def read_ident3d(options: ReadOptions) -> Ident3D:
    """Return a split of 3DIdent. Raises FileNotFoundError if files are missing or do not fit together."""
    folders = [options.root / d / options.split for d in ("3dident", "ident3d", "3DIdent", ".")]
    folder = next((f for f in folders if (f / "raw_latents.npy").is_file()), None)
    if folder is None:
        raise missing("ident3d", IDENT3D_FILES, options, "It is not downloaded by this program.")
    try:
        latents = np.load(folder / "raw_latents.npy")
    except Exception as error:  # numpy raises ValueError, EOFError, UnpicklingError
        why = f"({folder / 'raw_latents.npy'}: {first_line(error)})"
        raise missing("ident3d", IDENT3D_FILES, options, why) from None
    if latents.ndim != 2 or latents.shape[1] != len(IDENT3D_NAMES):
        why = f"(raw_latents.npy is {list(latents.shape)}, expected [N, {len(IDENT3D_NAMES)}])"
        raise missing("ident3d", IDENT3D_FILES, options, why)
    # Image numbers are padded with zeros to one width, so that the sorted files are in the latents' order.
    below = find_below(folder / "images")
    if len(below.images) != len(latents):
        why = f"({len(below.images)} images and {len(latents)} rows of latents in {folder})"
        raise missing("ident3d", IDENT3D_FILES, options, why)
    mode = "bilinear" if options.resize == "auto" else options.resize
    source = Ident3D(below.images, options, None, mode)
    source.latents = torch.from_numpy(latents).float()
    source.note = str(below.aside)
    return source
