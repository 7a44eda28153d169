"""Tiny data sets in the formats of their original files, with torchvision's checksums set to theirs.

Each writer puts its files where torchvision looks below `root`; the checks themselves stay as they are.
"""

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv

N_TRAIN, N_TEST = 8, 4
CIFAR10_BATCH = 2  # images in each of the five training files


def pixels(n, *shape):
    """Random uint8 images [n, *shape], the same each time."""
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx(path, array):
    """LeCun's idx format: two zeros, type 8 (uint8), number of dimensions, big-endian sizes, values."""
    sizes = np.array(array.shape, ">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def mnist(root, patch, folder="MNIST"):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for stem, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        idx(raw / f"{stem}-images-idx3-ubyte", pixels(n, 28, 28))
        idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(n) % 10)


def fashion_mnist(root, patch):
    mnist(root, patch, "FashionMNIST")


def dump(path, record):
    path.write_bytes(pickle.dumps(record, protocol=2))
    return [path.name, md5(path)]


def cifar10(root, patch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def batch(name, n):
        return dump(folder / name, {"data": pixels(n, 3072), "labels": [i % 10 for i in range(n)]})

    train = [batch(f"data_batch_{i}", CIFAR10_BATCH) for i in range(1, 6)]
    patch.setattr(tv.CIFAR10, "train_list", train)
    patch.setattr(tv.CIFAR10, "test_list", [batch("test_batch", N_TEST)])
    name, sum_ = dump(folder / "batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    patch.setattr(tv.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": sum_})


def cifar100(root, patch):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)

    def batch(name, n):
        labels = {"fine_labels": [99 - i for i in range(n)], "coarse_labels": [0] * n}
        return dump(folder / name, {"data": pixels(n, 3072), **labels})

    patch.setattr(tv.CIFAR100, "train_list", [batch("train", N_TRAIN)])
    patch.setattr(tv.CIFAR100, "test_list", [batch("test", N_TEST)])
    name, sum_ = dump(folder / "meta", {"fine_label_names": [f"class{i}" for i in range(100)]})
    patch.setattr(tv.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": sum_})


def svhn(root, patch):
    root.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        path = root / f"{split}_32x32.mat"
        # Images along the last axis, labels 1 to 10 where 10 is the digit 0.
        images = pixels(n, 32, 32, 3).transpose(1, 2, 3, 0)
        savemat(path, {"X": images, "y": np.arange(n)[:, None].astype(np.uint8) % 10 + 1})
        splits[split] = ["", path.name, md5(path)]
    patch.setattr(tv.SVHN, "split_list", splits)


def celeba(root, patch, folder="celeba"):
    base = root / folder
    (base / "img_align_celeba").mkdir(parents=True)
    total = N_TRAIN + 2 + N_TEST  # 2 of validation, which neither split may contain
    names = [f"{i + 1:06d}.jpg" for i in range(total)]
    # One grey level an image, so that a test can tell which image it was given.
    for i, name in enumerate(names):
        Image.fromarray(np.full((218, 178, 3), 10 * i, np.uint8)).save(base / "img_align_celeba" / name)
    part = [0] * N_TRAIN + [1] * 2 + [2] * N_TEST
    landmarks = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y "
    tables = {
        "list_eval_partition.txt": ("", part),
        "identity_CelebA.txt": ("", [1000 + i for i in range(total)]),
        "list_bbox_celeba.txt": ("image_id x_1 y_1 width height", ["   95  71  226  313"] * total),
        "list_landmarks_align_celeba.txt": (
            landmarks + "rightmouth_x rightmouth_y",
            [" 69  109  106  113   77  142   73  152  108  154"] * total,
        ),
        "list_attr_celeba.txt": (
            " ".join(f"Attribute_{i}" for i in range(40)) + " ",
            [" " + " ".join(["-1", " 1"] * 20)] * total,
        ),
    }
    sums = {}
    for name, (header, rows) in tables.items():
        lines = [f"{total}", header] if header else []
        lines += [f"{image} {row}" for image, row in zip(names, rows, strict=True)]
        (base / name).write_text("\n".join(lines) + "\n")
        sums[name] = md5(base / name)
    listed = [(url, sums.get(name, sum_), name) for url, sum_, name in tv.CelebA.file_list]
    patch.setattr(tv.CelebA, "file_list", listed)


WRITERS = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "celeba": celeba,
}
# What a split of the tiny sets holds: (training images, test images).
SIZES = dict.fromkeys(WRITERS, (N_TRAIN, N_TEST)) | {"cifar10": (5 * CIFAR10_BATCH, N_TEST)}


def write_all(root: Path, patch) -> None:
    """Every set below `root`."""
    for write in WRITERS.values():
        write(root, patch)
