"""The readers of the original files, on tiny sets in the same formats: what is read, what is refused."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from movae_fast.data import DATASETS, ReadOptions
from movae_fast.data.datasets.factor_grids import GRIDS
from movae_fast.data.fetch import Remote, fetch
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
    image = source.gather(torch.tensor([0]))[0][0] if hasattr(source, "gather") else source[0][0]
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
    "binary_mnist": "binary_mnist/binarized_mnist_train.amat",
    "omniglot": "omniglot/chardata.mat",
    "omniglot_105": "omniglot-py/images_background.zip",
    "flowers102": "flowers-102/imagelabels.mat",
    "shapes3d": "3dshapes.h5",
    "dsprites": "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
    "mpi3d_real": "mpi3d_real.npz",
    "ident3d": "3dident/train/raw_latents.npy",
}
# Sets whose publishers give no checksum: what keeps its shape cannot be told from the original.
UNCHECKED = {
    "mnist",
    "fashion_mnist",
    "binary_mnist",
    "omniglot",
    "shapes3d",
    "dsprites",
    "mpi3d_real",
    "ident3d",
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
    if name not in UNCHECKED:
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


def test_celeba_is_read_from_the_archive_as_downloaded(tmp_path, monkeypatch):
    datafiles.celeba(tmp_path, monkeypatch)
    base = tmp_path / "celeba"
    expected = read("celeba", tmp_path)[3][0]
    shutil.make_archive(str(base / "img_align_celeba"), "zip", base, "img_align_celeba")
    shutil.rmtree(base / "img_align_celeba")
    archive = base / "img_align_celeba.zip"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"img_align_celeba\.zip cannot be unpacked \(.*\): fetch it again"):
        read("celeba", tmp_path)
    assert not list(base.glob("*.part"))
    archive.write_bytes(whole)
    assert torch.equal(read("celeba", tmp_path)[3][0], expected)


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
        for module in ("mnist", "cifar", "svhn", "celeba", "omniglot", "flowers102", "dtd"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{function}", unreachable, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for name in datafiles.WRITERS:
        message = refused(name, tmp_path, download=True)
        if name in NOT_FETCHED:
            assert "It is n" in message
        else:
            assert "failed: " in message


# Sets that this program downloads nowhere.
NOT_FETCHED = {"omniglot", "imagenet", "ident3d", "dsprites", "mpi3d_toy", "mpi3d_realistic", "mpi3d_real"}


def test_factors_and_images_of_a_grid_belong_together(tmp_path, monkeypatch):
    for name in ("dsprites", "shapes3d", "mpi3d_toy"):
        datafiles.WRITERS[name](tmp_path, monkeypatch)
        stored, sizes = datafiles.grid_images(name), GRIDS[name].sizes
        seen = []
        for split in ("train", "test"):
            source = read(name, tmp_path, split)
            rows = torch.arange(len(source))
            images, labels = source.gather(rows)
            factors = source.factors(rows)
            # The position in the file by numpy's own rule for a grid whose last index is fastest.
            at = np.ravel_multi_index(tuple(factors.T.numpy()), sizes)
            expected = stored[at] * (255 if name == "dsprites" else 1)
            expected = expected[:, None] if expected.ndim == 3 else expected.transpose(0, 3, 1, 2)
            assert np.array_equal(images, expected)
            shape = [n.endswith("shape") for n in GRIDS[name].names].index(True)
            assert torch.equal(labels, factors[:, shape])
            seen += at.tolist()
        assert sorted(seen) == list(range(len(stored)))


def test_a_grid_on_another_device_stays_there(tmp_path, monkeypatch):
    datafiles.WRITERS["dsprites"](tmp_path, monkeypatch)
    source, elsewhere = read("dsprites", tmp_path), torch.device("meta")
    for _ in range(2):  # the loader's, and that of the mean image at the end of a run
        source.to(elsewhere)
        assert source.images.is_meta
        assert len(source.images) == len(source)


def test_two_splits_of_a_grid_share_the_array(tmp_path, monkeypatch):
    datafiles.WRITERS["dsprites"](tmp_path, monkeypatch)
    train, test = read("dsprites", tmp_path), read("dsprites", tmp_path, "test")
    assert train.images.data_ptr() == test.images.data_ptr()


def test_images_of_another_shape_are_refused_with_what_was_expected(tmp_path, monkeypatch):
    for name in ("dsprites", "shapes3d", "mpi3d_real"):
        datafiles.WRITERS[name](tmp_path, monkeypatch)
        grid = GRIDS[name]
        fewer = datafiles.grid_images(name)[:-1]
        datafiles.write_grid(tmp_path / grid.filename, grid, fewer)
        message = refused(name, tmp_path)
        assert f"{grid.member} {list(fewer.shape)} uint8, expected {[grid.size, *grid.image]} uint8" in message
    datafiles.omniglot(tmp_path, monkeypatch)
    savemat(tmp_path / "omniglot/chardata.mat", {"data": np.zeros((783, 4)), "target": np.zeros((50, 4))})
    assert "data [783, 4] and target [50, 4], expected [784, N] and [50, N]" in refused("omniglot", tmp_path)
    datafiles.ident3d(tmp_path, monkeypatch)
    np.save(tmp_path / "3dident/train/raw_latents.npy", np.zeros((8, 9)))
    assert "raw_latents.npy is [8, 9], expected [N, 10]" in refused("ident3d", tmp_path)
    (tmp_path / "binary_mnist").mkdir()
    (tmp_path / "binary_mnist/binarized_mnist_train.amat").write_text("0 1 2\n" * 784)
    assert "expected 50,000 lines of 784 zeros and ones" in refused("binary_mnist", tmp_path)


def test_values_of_the_sets_of_text_and_matrices(tmp_path, monkeypatch):
    datafiles.binary_mnist(tmp_path, monkeypatch)
    images, _ = read("binary_mnist", tmp_path, image_size=28).gather(torch.arange(8))
    assert np.array_equal(images[:, 0], 255 * (datafiles.pixels(8, 28, 28) % 2))
    datafiles.omniglot(tmp_path, monkeypatch)
    images, labels = read("omniglot", tmp_path, image_size=28).gather(torch.arange(8))
    assert np.array_equal(images[:, 0], datafiles.pixels(8, 28, 28))
    assert labels.tolist() == [49 - i for i in range(8)]


def test_labels_of_sets_of_image_files(tmp_path, monkeypatch):
    datafiles.imagenet(tmp_path, monkeypatch)
    source = read("imagenet", tmp_path)
    assert [(f.parent.name, y) for f, y in zip(source.files, source.labels, strict=True)] == [
        (f"n0000000{i}", i) for i in range(4) for _ in range(2)
    ]
    (tmp_path / "flat/imagenet/train").mkdir(parents=True)
    assert "has no class folders with images" in refused("imagenet", tmp_path / "flat")
    datafiles.flowers102(tmp_path, monkeypatch)
    assert read("flowers102", tmp_path).labels == list(range(8))
    (tmp_path / "flowers-102/jpg/image_00002.jpg").unlink()
    assert "1 of 8 train images are missing, as image_00002.jpg" in refused("flowers102", tmp_path)
    datafiles.dtd(tmp_path, monkeypatch)
    assert read("dtd", tmp_path).labels == [0, 0, 0, 0, 1, 1, 1, 1]
    datafiles.omniglot_105(tmp_path, monkeypatch)
    source = read("omniglot_105", tmp_path, image_size=105)
    assert len(set(source.labels)) == 4
    assert source[0][0].unique().tolist() == [0, 255]
    datafiles.ident3d(tmp_path, monkeypatch)
    source = read("ident3d", tmp_path)
    assert source.factors(torch.tensor([3])).tolist() == [[3.0 + 0.5 * j for j in range(10)]]
    assert source.files[3].name == "3.png"


class Answer(io.BytesIO):
    """What urlopen gives: bytes, a status, a context."""

    status = 206


def test_a_download_continues_where_it_stopped_and_is_checked(tmp_path, monkeypatch):
    data = bytes(range(256)) * 40
    remote = Remote("http://nowhere/file", len(data), hashlib.sha256(data).hexdigest())
    asked = []

    def urlopen(request, timeout):
        asked.append(request.get_header("Range"))
        start = int(asked[-1].split("=")[1][:-1]) if asked[-1] else 0
        return Answer(data[start:][:9000])  # the connection ends early the first time

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(OSError, match=r"has 9,000 bytes of 10,240; run again to continue"):
        fetch(remote, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    fetch(remote, tmp_path / "file")
    assert asked == [None, "bytes=9000-"]
    assert (tmp_path / "file").read_bytes() == data
    (tmp_path / "other.part").write_bytes(data[:-1] + b"x")
    with pytest.raises(OSError, match="SHA-256 is"):
        fetch(remote, tmp_path / "other")
    assert not (tmp_path / "other.part").exists()


@pytest.mark.parametrize("name", datafiles.WRITERS)
def test_every_set_trains_from_its_original_files(tmp_path, monkeypatch, train, name):
    datafiles.WRITERS[name](tmp_path / "data", monkeypatch)
    folder = train(
        f"--dataset {name}",
        f"--data_dir {tmp_path / 'data'}",
        "--download false",
        "--image_size 32",
        "--batch_size 2",
        "--limit_train 0",
        "--limit_test 0",
        "--steps 1",
        "--log_every 1",
        "--num_samples 2",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("test/mse" in line for line in lines)
