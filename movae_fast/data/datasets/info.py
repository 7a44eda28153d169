"""Define the description of a dataset, and helpers for the functions that read one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from movae_fast.names import shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from movae_fast.data.sources import Images, ImageSource, ReadOptions


@dataclass(frozen=True)
class DatasetInfo:
    """Describe a dataset: its sizes, the files it needs, its factors, and the function that reads it."""

    name: str
    channels: int
    native_size: int
    default_size: int
    n_train: int
    n_test: int
    read: Callable[[ReadOptions], ImageSource]
    files: str  # the files to put into data_dir, for users without a network
    flip: bool = False  # Mirror images at random while training.
    classes: int = 10
    factor_names: tuple[str, ...] = ()
    factor_sizes: tuple[int, ...] = ()  # numbers of values; empty where factors are continuous


def images_in_memory(
    images: ArrayLike,  # [N, H, W] or [N, H, W, 3] uint8
    labels: ArrayLike,  # [N]
    options: ReadOptions,
) -> Images:
    """Return arrays of images and labels as an image source in memory, resized as the options say."""
    # Imported here: what is known of a dataset is wanted where none is read.
    import numpy as np
    import torch

    from movae_fast.data.sources import Images
    from movae_fast.data.transforms import resize

    pixels = torch.as_tensor(np.asarray(images))
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    pixels = resize(pixels.contiguous(), options.image_size, options.resize)
    return Images(pixels, torch.as_tensor(np.asarray(labels)).long())


def missing(name: str, files: str, options: ReadOptions, error: Exception | str) -> FileNotFoundError:
    """Return the error for a dataset whose files are absent or damaged; it says which files belong where."""
    how = "" if options.download else " (--download false: nothing was fetched)"
    return FileNotFoundError(
        f"--dataset {name}: not found or damaged in --data_dir {shown(options.root)}{how}; wanted there: "
        f"{files}. {shown(error)}"
    )
