"""The DALI loader: its images against torchvision's, its order against the other loaders'."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

from movae_fast.data import DaliLoader, ImageFiles, ReadOptions, TorchLoader
from movae_fast.data.loaders import dali
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from tests import datafiles

CPU = torch.device("cpu")
N = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """JPEGs of CelebA's size."""
    folder = tmp_path_factory.mktemp("jpegs")
    for i in range(N):
        datafiles.photo(folder / f"{i:03d}.jpg", i, (178, 218))
    return sorted(folder.iterdir())


def source(files, mode="bicubic", box=(35, 15, 148, 148), size=64):
    return ImageFiles(
        files, ReadOptions(Path(), "train", size, False, CPU), box, mode, labels=range(len(files))
    )


def make(files, batch_size=8, **options):
    pytest.importorskip("nvidia.dali")
    options = {"train": True, "seed": 5} | options
    return DaliLoader(source(files), batch_size, CPU, num_threads=2, **options)


def labels_of(loader, epoch=0, start=0):
    return [int(label) for _, y in loader.epoch(epoch, start) for label in y]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(35, 15, 148, 148), None])
def test_images_are_torchvisions(files, mode, box):
    pytest.importorskip("nvidia.dali")
    pair = [
        torch.cat([x for x, _ in loader(source(files, mode, box), 32, CPU, train=False).epoch()])
        for loader in (DaliLoader, TorchLoader)
    ]
    assert pair[0].shape == (N, 3, 64, 64)
    difference = (pair[0] - pair[1]).abs().mean((1, 2, 3)) * 255
    assert float(difference.max()) <= 2
    shifted = (pair[0] - pair[1].roll(1, 3)).abs().mean((1, 2, 3)) * 255
    assert float(shifted.min()) > 2  # a crop one pixel off would not pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpus_images_are_the_cpus(files):
    pytest.importorskip("nvidia.dali")
    loaders = [
        DaliLoader(source(files), 32, torch.device(d), train=True, seed=5, flip=True) for d in ("cpu", "cuda")
    ]
    for number in range(2):
        for (x, y), (x2, y2) in zip(*(loader.epoch(number) for loader in loaders), strict=True):
            assert x2.device.type == y2.device.type == "cuda"
            assert torch.equal(y, y2.cpu())
            assert float((x - x2.cpu()).abs().mean((1, 2, 3)).max()) * 255 <= 2


def test_order_labels_and_mirroring_are_the_other_loaders(files):
    a, b = make(files, flip=True), TorchLoader(source(files), 8, CPU, train=True, seed=5, flip=True)
    for number in (0, 3):
        for (x, y), (x2, y2) in zip(a.epoch(number), b.epoch(number), strict=True):
            assert torch.equal(y, y2)
            assert float((x - x2).abs().mean()) * 255 <= 2


def test_an_epoch_continues_from_any_batch_and_after_being_left(files):
    loader = make(files, flip=True)
    whole = [(x.clone(), y) for x, y in loader.epoch(3)]
    assert len(whole) == 25
    for left_at in (1, 2, 24):
        epoch = loader.epoch(7)
        for _ in range(left_at):
            next(epoch)
        epoch.close()
        rest = list(loader.epoch(3, start=20))
        assert len(rest) == 5
        for (x, y), (x2, y2) in zip(whole[20:], rest, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    assert len(loader._idle) == 1


def test_two_epochs_at_once_do_not_disturb_each_other(files):
    loader = make(files)
    a, b = loader.epoch(0), loader.epoch(1)
    mixed = [(next(a)[1], next(b)[1]) for _ in range(25)]
    assert torch.cat([y for y, _ in mixed]).tolist() == labels_of(loader, 0)
    assert torch.cat([y for _, y in mixed]).tolist() == labels_of(loader, 1)


@pytest.mark.parametrize(("n", "batch_size"), [(200, 8), (53, 8), (7, 4), (3, 8)])
def test_two_ranks_share_every_image(files, n, batch_size):
    shares = [labels_of(make(files[:n], batch_size, train=False, rank=r, world=2)) for r in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(n))
    if n >= 2 * batch_size:
        train = [labels_of(make(files[:n], batch_size, rank=r, world=2), 4) for r in range(2)]
        assert len(train[0]) == len(train[1]) == n // (2 * batch_size) * batch_size
        assert len(set(train[0] + train[1])) == 2 * len(train[0])
        one = labels_of(make(files[:n], 2 * batch_size), 4)
        assert sorted(train[0] + train[1]) == sorted(one)


def test_evaluation_ends_with_the_incomplete_batch(files):
    loader = make(files[:53], train=False)
    for _ in range(2):
        assert labels_of(loader) == list(range(53))


def test_a_file_that_dali_alone_refuses_is_read_as_the_other_loaders_read_it(files, tmp_path, monkeypatch):
    # Nothing is known that is plain and that DALI refuses; some day something may be.
    monkeypatch.setattr(dali, "plain_size", lambda data, channels: (218, 178))
    folder = tmp_path / "some"
    folder.mkdir()
    for i, path in enumerate(files[:24]):
        data = path.read_bytes()
        if i in (5, 17, 18):
            at = data.index(b"\xff\xda")  # the scan begins; Pillow passes over what stands before it
            data = data[:at] + b"\0\0\0\0" + data[at:]
        (folder / path.name).write_bytes(data)
    mended = sorted(folder.iterdir())
    loader, plain = make(mended), make(files[:24])
    for number in (0, 1):
        pairs = zip(loader.epoch(number), plain.epoch(number), strict=True)
        assert all(torch.equal(y, y2) and (x - x2).abs().mean() * 255 < 2 for (x, y), (x2, y2) in pairs)
    assert loader._pillow_rows == {5, 17, 18}
    # Which it is that Pillow decodes does not hang on where an epoch began.
    whole, rest = ([x.clone() for x, _ in work.epoch(3, start=1)] for work in (loader, make(mended)))
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def resident_kib():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_over_epochs(files):
    loader = make(files, train=True)
    seen = []
    for number in range(7):
        for _ in loader.epoch(number):
            pass
        gc.collect()
        seen.append(resident_kib())
    # Epochs 2 to 7: the slope of a straight line through them, in MiB an epoch.
    x = torch.arange(6.0)
    y = torch.tensor(seen[1:], dtype=torch.float64) / 1024
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope < 1


def test_training_by_dali_resumes_with_the_same_figures(tmp_path, monkeypatch, train):
    pytest.importorskip("nvidia.dali")
    for i in range(40):
        datafiles.photo(tmp_path / "pictures" / f"{i:02d}.jpg", i)
    flags = [
        "--dataset folder",
        f"--data_dir {tmp_path / 'pictures'}",
        "--loader dali",
        "--num_workers 1",
        "--batch_size 4",
        "--num_samples 2",
        "--limit_train 0",
        "--limit_test 0",
        "--log_every 1",
    ]
    whole = train(*flags, "--steps 7")
    half = train(*flags, "--steps 3")
    train(f"--resume {half}", "--steps 7")
    last = [torch.load(f / "checkpoints/last.pt", weights_only=True)["model"] for f in (whole, half)]
    for name, value in last[0].items():
        assert torch.equal(value, last[1][name]), name


@pytest.mark.parametrize(("cuda", "extra"), [(None, "dali"), ("13.0", "dali"), ("12.8", "dali-cuda12")])
def test_without_dali_the_extra_is_named_before_anything_starts(monkeypatch, cuda, extra):
    monkeypatch.setattr(dali, "available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    config = TrainConfig()
    config.data.loader = "dali"
    with pytest.raises(ValueError, match=rf"pip install 'movae-fast\[{extra}\]'"):
        validate(config)


def test_what_dali_cannot_do_is_said(files):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ValueError, match="this dataset has none: use --loader resident"):
        DaliLoader(torch.zeros(100), 8, CPU, train=True)
    with pytest.raises(ValueError, match="--resize pad is for --loader torch"):
        DaliLoader(source(files, "pad"), 8, CPU, train=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_worker_leaves_its_parents_pipelines_alone(files):
    loader = make(files)
    next(iter(loader.epoch(0)))
    loader._idle[0][0].circle = loader._idle  # garbage that only the collector finds
    del loader
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # it may hang as well as crash
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    gc.collect()
