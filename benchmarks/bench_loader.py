"""Measure images per second, CPU time and memory of every loader and of torch's DataLoader.

  MOVAE_BENCH_DATA=data python -m benchmarks.run benchmarks/bench_loader.py

(-k share measures the share of a training step instead.) JPEGs of 178x218 become 64x64 (CelebA's crop), or
arrays of 32x32 are shuffled; batches of 128 arrive as float32 on the device. MOVAE_BENCH_SCENES names a folder
that keeps the rendered JPEGs, MOVAE_BENCH_IMAGES says how many are used, and MOVAE_BENCH_DATA where
Fashion-MNIST's files are. The peak memory is of the whole tree of processes, with shared pages counted once.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import Compose, Pad, ToTensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from movae_fast.cli import main
from movae_fast.data import DATASETS, ImageFiles, Images, ReadOptions, make_loader
from movae_fast.data.datasets.celeba import CELEBA_CROPS
from movae_fast.data.loaders import Loader, dali
from movae_fast.data.prepare import prepare
from movae_fast.data.prepared import open_split
from movae_fast.data.synthetic_jpegs import synthetic_jpeg
from movae_fast.data.tars import images_in

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = int(os.environ.get("MOVAE_BENCH_IMAGES", "20000"))
DATA = Path(os.environ.get("MOVAE_BENCH_DATA", "data"))
BATCH, SIZE = 128, 64
BOX = CELEBA_CROPS["center148"]


class TorchvisionDecode(ImageFiles):
    """Decode the image files with torchvision's JPEG decoder instead of Pillow."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = decode_jpeg(read_file(str(self.files[i])), ImageReadMode.RGB)
        top, left, height, width = self.box or (0, 0, *pixels.shape[1:])
        part = pixels[:, top : top + height, left : left + width]
        return TF.resize(part, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True), 0


@pytest.fixture(scope="session")
def scenes() -> Iterator[Path]:
    """Yield a folder of N rendered JPEGs that have been read once, so that no loader waits for the disk."""
    kept = os.environ.get("MOVAE_BENCH_SCENES")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(kept or temporary)
        synthetic_jpeg(folder, N)
        for path in folder.rglob("*.jpg"):
            path.read_bytes()
        yield folder


def options(folder: Path) -> ReadOptions:
    return ReadOptions(folder, "train", SIZE, False, DEVICE, resize="bicubic")


def files(folder: Path, kind: type[ImageFiles] = ImageFiles) -> ImageFiles:
    return kind(sorted(folder.rglob("*.jpg"))[:N], options(folder), BOX, "bicubic")


def mapped(folder: Path) -> Any:
    """Return the prepared file of the folder's training split, which is made by the first call, outside the
    timing."""
    info = DATASETS["folder"]
    opened = options(folder)
    prepare(info, opened, decoder="dali" if dali.available() else "pillow")
    return open_split(info, opened)


def workers(source: Any, number: int) -> Loader:
    return make_loader("torch", source, BATCH, DEVICE, num_workers=number, train=True)


def packed(folder: Path) -> ImageFiles:
    """Return the folder's images as read from a tar archive, which is written by the first call."""
    path = folder / f"{N}.tar"
    if not path.exists():
        with tarfile.open(path.with_suffix(".part"), "w") as tar:
            for file in files(folder).files:
                assert isinstance(file, Path)
                tar.add(file, file.name)
        path.with_suffix(".part").rename(path)
    path.read_bytes()  # in memory, as the files are
    return ImageFiles(images_in([path])[0], options(folder), BOX, "bicubic")


JPEG: dict[str, Callable[[Path], Loader]] = {
    "dali": lambda f: make_loader("dali", files(f), BATCH, DEVICE, train=True),
    "dali, from a tar": lambda f: make_loader("dali", packed(f), BATCH, DEVICE, train=True),
    "resident, first epoch": lambda f: make_loader("resident", files(f), BATCH, DEVICE, train=True),
    "resident, later epochs": lambda f: filled(make_loader("resident", files(f), BATCH, DEVICE, train=True)),
    "prepared memmap": lambda f: make_loader("resident", mapped(f), BATCH, DEVICE, train=True),
    "DataLoader, PIL, 1 worker": lambda f: workers(files(f), 1),
    "DataLoader, PIL, 2 workers": lambda f: workers(files(f), 2),
    "DataLoader, torchvision, 1 worker": lambda f: workers(files(f, TorchvisionDecode), 1),
    "DataLoader, torchvision, 2 workers": lambda f: workers(files(f, TorchvisionDecode), 2),
}


def filled(loader: Loader) -> Loader:
    for _ in loader.epoch(0):
        pass
    return loader


@pytest.mark.parametrize("name", JPEG)
def test_jpeg_178x218_to_64x64(benchmark: Any, scenes: Path, name: str) -> None:
    if name.startswith("dali"):
        pytest.importorskip("nvidia.dali")
    # An epoch of a loader that decodes takes seconds; other loaders need several epochs for a reliable time.
    measure(benchmark, f"JPEG 178x218 to 64x64, {N:,} images", JPEG[name](scenes), epochs=epochs(name))


def epochs(name: str) -> int:
    return 5 if name in ("prepared memmap", "resident, later epochs") else 1


def arrays() -> Images:
    """Return 60,000 random images of 1x32x32, the size of Fashion-MNIST as the trainer pads it."""
    pixels = np.random.default_rng(0).integers(0, 256, (60_000, 1, 32, 32), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.zeros(60_000, dtype=torch.int64))


class AsTorchvision(Loader):
    """Load Fashion-MNIST as torchvision's examples do: each item is a PIL image, padded and then made a
    tensor."""

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        transform = Compose([Pad(2), ToTensor()])
        data = FashionMNIST(DATA, train=True, transform=transform)
        for images, labels in DataLoader(data, BATCH, shuffle=True, num_workers=2, drop_last=True):
            yield images.to(DEVICE), labels.to(DEVICE)


SMALL: dict[str, Callable[[Images], Loader]] = {
    "resident": lambda source: make_loader("resident", source, BATCH, DEVICE, train=True),
    "DataLoader, 1 worker": lambda source: workers(source, 1),
    "DataLoader, 2 workers": lambda source: workers(source, 2),
}


@pytest.mark.parametrize("name", SMALL)
def test_arrays_32x32(benchmark: Any, name: str) -> None:
    loader = SMALL[name](arrays())
    measure(benchmark, "arrays 1x32x32, 60,000 images", loader, epochs=5 if name == "resident" else 1)


@pytest.mark.parametrize("name", [*SMALL, "torchvision's dataset in a DataLoader, 2 workers"])
def test_fashion_mnist_at_32x32(benchmark: Any, name: str) -> None:
    if not (DATA / "FashionMNIST").is_dir():
        pytest.skip(f"no FashionMNIST in {DATA}: set MOVAE_BENCH_DATA")
    source = DATASETS["fashion_mnist"].read(ReadOptions(DATA, "train", 32, False, DEVICE))
    assert isinstance(source, Images)
    loader = SMALL[name](source) if name in SMALL else AsTorchvision(source, BATCH, DEVICE, train=True)
    group = f"Fashion-MNIST 1x32x32, {len(source):,} images"
    measure(benchmark, group, loader, epochs=5 if name == "resident" else 1)


@pytest.mark.parametrize("loader", ["dali", "resident", "prepared", "torch"])
def test_data_wait_share_of_training(benchmark: Any, scenes: Path, tmp_path: Path, loader: str) -> None:
    """Record which share of a training step of `vae` at 64x64 is spent waiting for images, without the first
    log line.

    For the resident loader this is the first epoch, in which it decodes; `prepared` maps the prepared file.
    """
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    if loader == "prepared":
        mapped(scenes)  # bicubic; the others find no prepared file for their resampling
    command = (
        f"train --dataset folder --data_dir {scenes} --arch vae --agg upgrad --steps 30 --image_size 64 "
        f"--loader {loader if loader != 'prepared' else 'resident --resize bicubic'} --num_workers 2 "
        f"--batch_size 64 --log_every 10 --eval_freq 0 --limit_train 4000 --limit_test 64 --num_samples 1 "
        f"--exp_dir {tmp_path / 'run'} --seed 0"
    )
    benchmark.group = "data-wait share of a training step, vae 64x64, batch 64"
    benchmark.pedantic(lambda: main(command.split()), rounds=1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/data_wait_share" in line][1:]
    benchmark.extra_info["data-wait share"] = float(np.mean([v["train/data_wait_share"] for v in trained]))
    benchmark.extra_info["ms a step"] = float(np.mean([v["train/step_ms_p50"] for v in trained]))
    benchmark.extra_info["images/s"] = float(np.mean([v["train/images_per_s"] for v in trained]))
    print(loader, dict(benchmark.extra_info))


def measure(benchmark: Any, group: str, loader: Loader, epochs: int) -> None:
    """Time `epochs` epochs after two warm-up batches, and record images per second, CPU time and peak
    memory."""
    for _, _batch in zip(range(2), loader.epoch(99), strict=False):
        pass
    gc.collect()
    numbers = iter(range(epochs))
    seen = 0

    def epoch() -> None:
        nonlocal seen
        for images, _ in loader.epoch(next(numbers)):
            seen += len(images)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group  # read when the timing begins
    with PeakMemory() as peak:
        before, start = cpu_seconds(), time.perf_counter()
        benchmark.pedantic(epoch, rounds=epochs)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    benchmark.extra_info["images/s"] = seen / seconds
    benchmark.extra_info["CPU s per 1,000"] = 1000 * cpu / seen
    benchmark.extra_info["peak MiB"] = peak.mib
    print({k: round(v, 4) for k, v in benchmark.extra_info.items()})


def cpu_seconds() -> float:
    """Return the user and system time of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class PeakMemory:
    """Measure the peak proportional set size of this process and its children inside a `with` block (Linux).

    It is sampled five times per second; `mib` holds the result.
    """

    def __enter__(self) -> PeakMemory:
        self.mib, self.stop = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while True:
            self.mib = max(self.mib, sum(map(proportional_kib, [os.getpid(), *children()])) / 1024)
            if self.stop.wait(0.2):
                break


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def proportional_kib(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has just ended
        return 0
    return int(text.split("Pss:")[1].split()[0])
