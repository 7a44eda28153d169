"""Read the datasets that need no files: sprites, which are rendered, and scikit-learn's digits."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from movae_fast.data.datasets.info import images_in_memory
from movae_fast.data.datasets.sprites import Sprites, split_index
from movae_fast.data.sources import Images, ReadOptions

DIGITS_TEST = 297  # images


def read_sprites(options: ReadOptions) -> Sprites:
    """Return a split of the sprites, which are rendered on the options' device."""
    return Sprites(split_index(options.split), options.image_size, options.device, options.antialias)


def read_digits(options: ReadOptions) -> Images:
    """Return a split of scikit-learn's 1,797 digits, shuffled once in a fixed order; the last 297 are the test
    split."""
    images, labels = _digits()
    order = np.random.RandomState(0).permutation(len(images))
    rows = order[-DIGITS_TEST:] if options.split == "test" else order[:-DIGITS_TEST]
    return images_in_memory(images[rows], labels[rows], options)


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images [1797, 8, 8] and labels [1797]; scikit-learn reads them from text."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
