"""Tiny data sets in the formats of their original files, with torchvision's checksums set to theirs.

Each writer puts its files where torchvision looks below `root`; the checks themselves stay as they are.
"""

import dataclasses
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv

from movae_fast.data.datasets.factor_grids import GRIDS
from movae_fast.data.datasets.original_files import BINARY_MNIST

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


def binary_mnist(root, patch):
    folder = root / "binary_mnist"
    folder.mkdir(parents=True)
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        rows = (pixels(n, 28, 28) % 2).reshape(n, 784)
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (folder / f"binarized_mnist_{split}.amat").write_text(text)
        patch.setitem(BINARY_MNIST, split, dataclasses.replace(BINARY_MNIST[split], size=len(text)))


def omniglot(root, patch):
    folder = root / "omniglot"
    folder.mkdir(parents=True)
    tables = {}
    for prefix, n in (("", N_TRAIN), ("test", N_TEST)):
        # Columns are images, each with its columns one after another, as Matlab keeps them.
        tables[f"{prefix}data"] = pixels(n, 28, 28).transpose(0, 2, 1).reshape(n, 784).T / 255
        tables[f"{prefix}target"] = np.eye(50)[:, [49 - i for i in range(n)]]
    savemat(folder / "chardata.mat", tables)


def omniglot_105(root, patch):
    folder = root / "omniglot-py"
    sums = {}
    for part, n in (("images_background", N_TRAIN), ("images_evaluation", N_TEST)):
        for i in range(n):
            drawings = folder / part / f"Alphabet{i % 2}" / f"character{i % 4:02d}"
            drawings.mkdir(parents=True, exist_ok=True)
            drawing = Image.fromarray(pixels(n, 105, 105)[i] > 127)
            drawing.save(drawings / f"{i % 4:04d}_{i:02d}.png")
        archive = folder / f"{part}.zip"
        archive.write_bytes(f"the archive of {part}".encode())
        sums[part] = md5(archive)
    patch.setattr(tv.Omniglot, "zips_md5", sums)


def photo(path, seed=0, size=(40, 30)):
    """A colour JPEG, smooth as photographs are."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, format="JPEG", quality=90)


def flowers102(root, patch):
    folder = root / "flowers-102"
    total = N_TRAIN + N_TEST
    for i in range(1, total + 1):
        photo(folder / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(1, total + 1)})
    ids = np.arange(1, total + 1)
    savemat(folder / "setid.mat", {"trnid": ids[:N_TRAIN], "valid": ids[:1], "tstid": ids[N_TRAIN:]})
    sums = dict(tv.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        sums[key] = (name, md5(folder / name))
    patch.setattr(tv.Flowers102, "_file_dict", sums)


def dtd(root, patch):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        names = [f"{kind}/{kind}_{split}_{i}.jpg" for kind in ("banded", "woven") for i in range(n // 2)]
        for i, name in enumerate(names):
            photo(folder / "images" / name, i)
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")


def imagenet(root, patch):
    for part, n in (("train", N_TRAIN), ("val", N_TEST)):
        for i in range(n):
            photo(root / "imagenet" / part / f"n0000000{i // 2}" / f"n0000000{i // 2}_{i}.JPEG", i)


def ident3d(root, patch):
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        folder = root / "3dident" / split
        (folder / "images").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(pixels(n, 224, 224, 3)[i]).save(folder / "images" / f"{i}.png")
        np.save(folder / "raw_latents.npy", np.arange(n)[:, None] + 0.5 * np.arange(10))


# Grids of factors small enough for a test, in place of the sets' own.
TINY_GRIDS = {
    "dsprites": (1, 3, 2, 2, 1, 2),
    "shapes3d": (2, 1, 2, 1, 2, 3),
    "mpi3d_toy": (2, 3, 1, 2, 1, 1, 2),
    "mpi3d_realistic": (2, 3, 1, 2, 1, 1, 2),
    "mpi3d_real": (2, 3, 1, 2, 1, 1, 2),
}
GRID_SIZE = 24


def grid_images(name):
    """What the file of a tiny grid holds: zeros and ones in dsprites, else grey levels."""
    if name == "dsprites":
        return pixels(GRID_SIZE, 64, 64) % 2
    return pixels(GRID_SIZE, 64, 64, 3)


def write_grid(path, grid, images):
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=images)
            file.create_dataset("labels", data=np.zeros((len(images), len(grid.sizes))))
    else:
        np.savez_compressed(path, **{grid.member: images, "latents_classes": np.zeros((len(images), 6), int)})


def grid(name):
    def write(root, patch):
        root.mkdir(parents=True, exist_ok=True)
        tiny = dataclasses.replace(GRIDS[name], sizes=TINY_GRIDS[name])
        patch.setitem(GRIDS, name, tiny)
        write_grid(root / tiny.filename, tiny, grid_images(name))

    return write


WRITERS = {
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "celeba": celeba,
    "binary_mnist": binary_mnist,
    "omniglot": omniglot,
    "omniglot_105": omniglot_105,
    "flowers102": flowers102,
    "dtd": dtd,
    "imagenet": imagenet,
    "ident3d": ident3d,
    **{name: grid(name) for name in TINY_GRIDS},
}
# What a split of the tiny sets holds: (training images, test images).
SIZES = dict.fromkeys(WRITERS, (N_TRAIN, N_TEST)) | {"cifar10": (5 * CIFAR10_BATCH, N_TEST)}
SIZES |= dict.fromkeys(TINY_GRIDS, (GRID_SIZE - GRID_SIZE // 10, GRID_SIZE // 10))


def write_all(root: Path, patch) -> None:
    """Every set below `root`."""
    for write in WRITERS.values():
        write(root, patch)


def shard(path: Path, samples: dict[str, bytes]) -> Path:
    """A tar of the given files, name -> content, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def jpeg(seed, size=(40, 30)) -> bytes:
    """`photo` as bytes."""
    buffer = io.BytesIO()
    photo(buffer, seed, size)
    return buffer.getvalue()


def labelled(numbers, label=lambda i: i) -> dict[str, bytes]:
    """Samples of webdataset: a JPEG each and its class, numbered."""
    pairs = ((f"{i:04d}.jpg", jpeg(i), f"{i:04d}.cls", b"%d" % label(i)) for i in numbers)
    return {name: content for a, b, c, d in pairs for name, content in ((a, b), (c, d))}
