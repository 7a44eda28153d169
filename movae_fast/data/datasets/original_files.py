"""Read two datasets whose published files no library reads: Larochelle's binary MNIST, and Omniglot at
28x28."""

from __future__ import annotations

import numpy as np

from movae_fast.data.datasets.facts import BINARY_MNIST, BINARY_MNIST_FILES, OMNIGLOT_FILES
from movae_fast.data.datasets.info import images_in_memory, missing
from movae_fast.data.fetch import fetch
from movae_fast.data.sources import Images, ReadOptions
from movae_fast.names import first_line


def read_binary_mnist(options: ReadOptions) -> Images:
    """Return the train or test split of Larochelle's binarised MNIST, without its validation images.

    Raises FileNotFoundError if the file is missing or damaged.
    """
    filename = f"binarized_mnist_{options.split}.amat"
    path = next((p for d in ("binary_mnist", ".") if (p := options.root / d / filename).is_file()), None)
    if path is None and options.download:
        path = options.root / "binary_mnist" / filename
        try:
            fetch(BINARY_MNIST[options.split], path)
        except OSError as error:
            why = f"Downloading failed: {first_line(error)}"
            raise missing("binary_mnist", BINARY_MNIST_FILES, options, why) from None
    if path is None:
        raise missing("binary_mnist", BINARY_MNIST_FILES, options, "")
    # A line is 784 digits, each followed by a blank or the line's end: every second byte is a pixel.
    data, size = np.fromfile(path, np.uint8), BINARY_MNIST[options.split].size
    pixels = data[::2] - ord("0") if len(data) else data
    if len(data) != size or pixels.max() > 1:
        lines = f"{size // (2 * 784):,} lines of 784 zeros and ones, separated by single blanks"
        why = f"({path.name} of {len(data):,} bytes: expected {lines}, {size:,} bytes)"
        raise missing("binary_mnist", BINARY_MNIST_FILES, options, why)
    images = 255 * pixels.reshape(-1, 28, 28)
    return images_in_memory(images, np.zeros(len(images), np.int64), options)


def read_omniglot(options: ReadOptions) -> Images:
    """Return a split of Omniglot at 28x28 as Burda et al. (IWAE) use it, from chardata.mat; labels are the
    alphabets.

    Raises FileNotFoundError if the file is missing or damaged.
    """
    from scipy.io import loadmat

    path = next((p for d in ("omniglot", ".") if (p := options.root / d / "chardata.mat").is_file()), None)
    if path is None:
        why = "It is not downloaded by this program." * options.download
        raise missing("omniglot", OMNIGLOT_FILES, options, why)
    data, target = ("data", "target") if options.split == "train" else ("testdata", "testtarget")
    try:
        tables = loadmat(path)
        pixels, alphabets = tables[data], tables[target]
    except Exception as error:  # scipy's readers have errors of many kinds
        raise missing("omniglot", OMNIGLOT_FILES, options, f"({path.name}: {first_line(error)})") from None
    n = pixels.shape[-1]
    if pixels.shape != (784, n) or alphabets.shape != (50, n):
        shapes = f"{data} {list(pixels.shape)} and {target} {list(alphabets.shape)}"
        raise missing("omniglot", OMNIGLOT_FILES, options, f"({shapes}, expected [784, N] and [50, N])")
    # Matlab wrote an image per column, and the first index of an image varies fastest.
    images = (pixels.T.reshape(n, 28, 28).transpose(0, 2, 1) * 255).round().astype(np.uint8)
    return images_in_memory(images, alphabets.argmax(0), options)
