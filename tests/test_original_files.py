"""The readers of the original files, on tiny sets in the same formats: what is read, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from movae_fast.data import DATASETS, ReadOptions
from tests import datafiles

CPU = torch.device("cpu")


def read(name, root, split="train", **options):
    given = {"image_size": DATASETS[name].default_size, "download": False} | options
    return DATASETS[name].read(ReadOptions(Path(root), split, device=CPU, **given))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", datafiles.WRITERS)
def test_splits_have_their_images(tmp_path, monkeypatch, name, split):
    datafiles.WRITERS[name](tmp_path, monkeypatch)
    source = read(name, tmp_path, split)
    info = DATASETS[name]
    assert len(source) == datafiles.SIZES[name][split == "test"]
    image = source[0][0] if name == "celeba" else source.gather(torch.tensor([0]))[0][0]
    assert image.dtype == torch.uint8
    assert image.shape == (info.channels, info.default_size, info.default_size)


def test_values_and_labels_are_the_files_own(tmp_path, monkeypatch):
    datafiles.write_all(tmp_path, monkeypatch)
    rows = torch.arange(datafiles.N_TRAIN)
    for name in ("mnist", "fashion_mnist"):
        images, labels = read(name, tmp_path).gather(rows)
        assert np.array_equal(images[:, 0, 2:-2, 2:-2], datafiles.pixels(8, 28, 28))  # padded to 32
        assert images[:, :, :2].sum() == 0
        assert labels.tolist() == list(range(8))
    images, labels = read("cifar100", tmp_path).gather(rows)
    assert np.array_equal(images, datafiles.pixels(8, 3, 32, 32))
    assert labels.tolist() == [99 - i for i in range(8)]
    images, labels = read("cifar10", tmp_path).gather(rows)
    assert np.array_equal(images[2:4], datafiles.pixels(2, 3, 32, 32))
    assert labels.tolist() == [0, 1] * 4
    images, labels = read("svhn", tmp_path).gather(rows)
    assert np.array_equal(images, datafiles.pixels(8, 32, 32, 3).transpose(0, 3, 1, 2))
    assert labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_celeba_splits_leave_the_validation_images_out(tmp_path, monkeypatch):
    datafiles.celeba(tmp_path, monkeypatch)
    for split, first in (("train", 0), ("test", datafiles.N_TRAIN + 2)):
        source = read("celeba", tmp_path, split)
        levels = [float(source[i][0].float().mean()) for i in range(len(source))]
        assert levels == pytest.approx([10 * (first + i) for i in range(len(source))], abs=1)


# name -> a file whose bytes the reader must check, and where it is.
CHECKED = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion_mnist": "FashionMNIST/raw/train-labels-idx1-ubyte",
    "cifar10": "cifar-10-batches-py/data_batch_3",
    "cifar100": "cifar-100-python/train",
    "svhn": "train_32x32.mat",
    "celeba": "celeba/list_eval_partition.txt",
}


def refused(name, root, **options):
    with pytest.raises(FileNotFoundError) as caught:
        read(name, root, **options)
    message = str(caught.value)
    assert f"--dataset {name}: not found or damaged in --data_dir {root}" in message
    assert DATASETS[name].files in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", CHECKED)
def test_missing_truncated_and_altered_files_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    assert "--download false" in refused(name, tmp_path / "empty")
    datafiles.WRITERS[name](tmp_path, monkeypatch)
    path = tmp_path / CHECKED[name]
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 3, 0):
        path.write_bytes(whole[:kept])
        refused(name, tmp_path)
    if "mnist" not in name:  # torchvision knows no checksum of MNIST's unpacked files
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(name, tmp_path)
    path.write_bytes(whole)
    read(name, tmp_path)
    path.unlink()
    refused(name, tmp_path)


def test_mnist_images_and_labels_must_be_as_many(tmp_path, monkeypatch):
    datafiles.mnist(tmp_path, monkeypatch)
    datafiles.idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.arange(5))
    assert "8 images and 5 labels" in refused("mnist", tmp_path)


def test_celeba_images_that_are_not_there_are_counted_and_named(tmp_path, monkeypatch):
    datafiles.celeba(tmp_path, monkeypatch)
    folder = tmp_path / "celeba" / "img_align_celeba"
    (folder / "000002.jpg").unlink()
    (folder / "000003.jpg").unlink()
    message = refused("celeba", tmp_path)
    assert "2 of 8 train images are missing, as 000002.jpg" in message


def test_a_celeba_image_cut_short_is_named(tmp_path, monkeypatch):
    datafiles.celeba(tmp_path, monkeypatch)
    path = tmp_path / "celeba" / "img_align_celeba" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"000001\.jpg is not a readable image"):
        read("celeba", tmp_path)[0]


def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    for function in ("download_and_extract_archive", "download_url", "download_file_from_google_drive"):
        for module in ("mnist", "cifar", "svhn", "celeba"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", unreachable, raising=False)
    for name in datafiles.WRITERS:
        assert "Downloading them failed: " in refused(name, tmp_path, download=True)
