"""Sprites, transforms, and both loaders."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from movae_fast.data import (
    DATASETS,
    Images,
    ImageSource,
    ReadOptions,
    ResidentLoader,
    Subset,
    TorchLoader,
    choose_loader,
    limited,
    make_loader,
)
from movae_fast.data.datasets import sprites
from movae_fast.data.loaders.resident import compiled_batch_of
from movae_fast.data.prefetch import prefetched
from movae_fast.data.transforms import batch_of, finish, pick, resize, to_unit

CPU = torch.device("cpu")


def test_factors_and_indices_are_inverse_and_ordered_like_dsprites():
    index = torch.arange(0, sprites.SIZE, 997)
    factors = sprites.factors_of(index)
    assert torch.equal(sprites.index_of(factors), index)
    assert (factors.max(0).values < torch.tensor(sprites.FACTOR_SIZES)).all()
    assert sprites.factors_of(torch.tensor([0, 1, sprites.SIZE - 1])).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [2, 5, 39, 31, 31],
    ]
    assert sprites.SIZE == 737_280


def centre_of_mass(image):
    pixels = image.double()
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    return float((pixels * xs).sum() / pixels.sum()), float((pixels * ys).sum() / pixels.sum())


@pytest.mark.parametrize("shape", range(3))
def test_factors_do_what_they_say(shape):
    base = torch.tensor([[shape, 3, 0, 16, 16]])
    image = sprites.render(base)[0, 0]
    assert image.unique().tolist() == [0, 255]
    right, down = base.clone(), base.clone()
    right[0, 3], down[0, 4] = 31, 31
    x0, y0 = centre_of_mass(image)
    x1, y1 = centre_of_mass(sprites.render(right)[0, 0])
    x2, y2 = centre_of_mass(sprites.render(down)[0, 0])
    assert x1 - x0 == pytest.approx(15 * 32 / 31, abs=0.6)
    assert abs(y1 - y0) < 0.6
    assert y2 - y0 == pytest.approx(15 * 32 / 31, abs=0.6)
    assert abs(x2 - x0) < 0.6
    areas = [float((sprites.render(torch.tensor([[shape, s, 0, 16, 16]])) > 0).sum()) for s in range(6)]
    assert areas == sorted(areas)
    assert areas[5] / areas[0] == pytest.approx(4, rel=0.15)  # scale 0.5 to 1


def test_a_quarter_turn_turns_the_picture():
    upright = sprites.render(torch.tensor([[2, 5, 0, 16, 16]]), antialias=True)
    turned = sprites.render(torch.tensor([[2, 5, 10, 16, 16]]), antialias=True)
    # Position 16 is half a pixel off the centre of a 64-pixel image: turn about the sprite, not the image.
    shift = (16 + 16 * 32 / 31) - 32
    assert abs(shift) < 1
    difference = (torch.rot90(upright, -1, (2, 3)).float() - turned.float()).abs().mean() / 255
    assert difference < 0.02


def test_every_sprite_lies_inside_the_image_at_any_size():
    corners = torch.cartesian_prod(
        torch.arange(3), torch.tensor([5]), torch.arange(40), torch.tensor([0, 31]), torch.tensor([0, 31])
    )
    for size in (32, 64):
        images = sprites.render(corners, size)
        border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]])
        assert border.max() == 0
        assert (images.flatten(1).max(1).values == 255).all()


def test_antialiasing_keeps_the_area_and_the_resolution_scales_it():
    factors = sprites.factors_of(torch.arange(0, sprites.SIZE, 7919))
    hard, soft = sprites.render(factors), sprites.render(factors, antialias=True)
    fine = sprites.render(factors, size=256)
    area = [v.double().mean((1, 2, 3)) / 255 for v in (hard, soft, fine)]
    assert ((area[1] - area[2]).abs() / area[2]).mean() < 0.02
    assert ((area[0] - area[2]).abs() / area[2]).mean() < 0.05


def test_sprites_splits_are_a_partition():
    train, test = sprites.split_index("train"), sprites.split_index("test")
    assert len(train) + len(test) == sprites.SIZE
    assert len(torch.cat([train, test]).unique()) == sprites.SIZE


def options(split="train", **changes):
    values = {"root": Path("none"), "split": split, "image_size": 32, "download": False, "device": CPU}
    return ReadOptions(**(values | changes))


@pytest.mark.parametrize("name", ["digits", "sprites"])
def test_embedded_sets_match_their_records(name):
    info = DATASETS[name]
    for split, n in (("train", info.n_train), ("test", info.n_test)):
        source = info.read(options(split))
        assert len(source) == n
        images, labels = source.gather(torch.tensor([0, n - 1]))
        assert images.dtype == torch.uint8
        assert images.shape == (2, info.channels, 32, 32)
        assert labels.max() < info.classes


def test_padding_keeps_values_and_resampling_keeps_means():
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    padded = resize(images, 32)
    assert torch.equal(padded[..., 2:30, 2:30], images)
    assert padded.sum() == images.sum()
    smaller = resize(images, 14)
    assert smaller.shape == (5, 1, 14, 14)
    assert abs(float(smaller.float().mean() - images.float().mean())) < 2
    assert resize(images, 28) is images
    with pytest.raises(ValueError, match="--resize pad cannot shrink 28x28 to 16x16"):
        resize(images, 16, "pad")


def test_finish_normalises_and_mirrors():
    images = torch.tensor([[[[0, 255]]], [[[0, 255]]]], dtype=torch.uint8)
    plain = finish(images, torch.tensor([False, True]), normalize=False)
    assert plain.flatten().tolist() == [0, 1, 1, 0]
    assert finish(images, None, normalize=True).flatten().tolist() == [-1, 1, -1, 1]
    assert torch.equal(to_unit(finish(images, None, True), True), finish(images, None, False))


def stored(channels, memory_format=torch.channels_last):
    images = torch.randint(0, 256, (50, channels, 8, 6), dtype=torch.uint8)
    return images.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("flip", [None, torch.arange(20) % 3 == 0])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_region_gives_what_its_parts_give(channels, flip, normalize):
    rows, labels = torch.randperm(50)[:20], torch.arange(50) * 7
    for layout in (torch.channels_last, torch.contiguous_format):
        images = stored(channels, layout)
        x, y = batch_of(images, labels, rows, flip, normalize)
        expected = images[rows].double() / 255
        if flip is not None:
            expected[flip] = expected[flip].flip(3)
        expected = expected * 2 - 1 if normalize else expected
        assert float((x - expected).abs().max()) < 2**-22  # two roundings of float32 below 2
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.tolist() == [7 * int(r) for r in rows]
        assert torch.equal(x, finish(pick(images, rows), flip, normalize))
        assert pick(images, rows).is_contiguous(memory_format=layout)


@pytest.mark.slow
def test_the_region_is_one_kernel_for_images_and_one_for_labels():
    from torch._inductor import metrics

    metrics.reset()
    torch._dynamo.reset()
    images, rows, flip = stored(3), torch.randperm(50)[:20], torch.arange(20) % 3 == 0
    x, _ = torch.compile(batch_of, fullgraph=True)(images, torch.arange(50), rows, flip, True)
    assert metrics.generated_kernel_count == 2
    assert torch.equal(x, finish(pick(images, rows), flip, True))


def test_the_region_is_used_where_the_set_lies_on_the_device(monkeypatch, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i * 10, i, 0)).save(tmp_path / f"{i:02d}.png")
    files = DATASETS["folder"].read(options(root=tmp_path, image_size=4))
    calls = []
    monkeypatch.setattr(
        "movae_fast.data.loaders.resident.compiled_batch_of", lambda: lambda *a: calls.append(0) or batch_of(*a)
    )
    for made in (lambda: limited(source(), 18), lambda: files):
        plain, region = (ResidentLoader(made(), 4, CPU, train=True, seed=5, flip=True) for _ in range(2))
        region.compiled = True
        for number in (0, 1, 1):  # files are all there after the first epochs
            for (x, y), (x2, y2) in zip(plain.epoch(number), region.epoch(number), strict=True):
                assert torch.equal(x, x2)
                assert torch.equal(y, y2)
        calls.clear()
        whole, rest = list(region.epoch(1)), list(region.epoch(1, start=2))
        assert len(calls) == 4 + 2
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_resident_batch_on_a_gpu_waits_for_nothing(channels):
    images = stored(channels)
    loaders = [
        ResidentLoader(Images(images, torch.arange(50)), 16, torch.device(d), train=True, flip=True)
        for d in ("cpu", "cuda")
    ]
    list(loaders[1].epoch(0))  # compiles
    epochs = [list(loader.epoch(1)) for loader in loaders]
    batches = loaders[1].epoch(2)
    next(batches)  # the epoch's order goes to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x2, y2) in zip(*epochs, strict=True):
        assert x2.is_contiguous(memory_format=torch.channels_last)
        assert float((x - x2.cpu()).abs().max()) < 2**-22
        assert torch.equal(y, y2.cpu())
    assert compiled_batch_of() is compiled_batch_of()


def source(n=53):
    return Images(
        torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).clone(), torch.arange(n)
    )


LOADERS = {
    "resident": lambda **k: ResidentLoader(source(), 8, CPU, **k),
    "torch": lambda **k: TorchLoader(source(), 8, CPU, **k),
    "torch with workers": lambda **k: TorchLoader(source(), 8, CPU, num_workers=2, **k),
}


def labels_of(loader, epoch, start=0):
    return torch.cat([y for _, y in loader.epoch(epoch, start)]).tolist()


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_epoch_is_a_shuffle_of_the_set(make):
    loader = make(train=True, seed=5)
    first, again, second = labels_of(loader, 0), labels_of(loader, 0), labels_of(loader, 1)
    assert first == again != second
    assert len(loader) == 6
    assert len(set(first)) == 48  # 53 images, the incomplete batch dropped
    assert first != sorted(first)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_padded_epoch_counts_every_image_once(make, world):
    loaders = [make(train=True, seed=5, flip=True, pad=True, rank=rank, world=world) for rank in range(world)]
    counted, shares = [], []
    for loader in loaders:
        batches = list(loader.epoch(2))
        assert len(batches) == len(loader) == -(-53 // (8 * world))
        assert {x.shape for x, _ in batches} == {(8, 1, 2, 2)}
        for k, (_, y) in enumerate(batches):
            share = loader.sample_weight_of(k)
            counted += y[share > 0].tolist()
            shares.append((k, share))
    assert sorted(counted) == list(range(53))
    for k in range(len(loaders[0])):
        share = torch.cat([s for j, s in shares if j == k])
        assert float(share.mean()) == pytest.approx(1, abs=1e-6)
        assert share.unique().numel() <= 2
    dropping = make(train=True, seed=5, flip=True, rank=world - 1, world=world)
    for (x, y), (x2, y2) in zip(dropping.epoch(2), loaders[-1].epoch(2), strict=False):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert dropping.sample_weight_of(0) is None


def test_padding_fills_a_batch_that_is_larger_than_the_set():
    loader = ResidentLoader(source(5), 16, CPU, train=True, pad=True)
    ((x, y),) = loader.epoch(0)
    share = loader.sample_weight_of(0)
    assert len(x) == 16
    assert y.bincount().min() == 3
    assert sorted(y[share > 0].tolist()) == list(range(5))
    assert float(share.sum()) == pytest.approx(16)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_epoch_continues_from_any_batch(make):
    loader = make(train=True, seed=5, flip=True)
    whole = list(loader.epoch(3))
    rest = list(loader.epoch(3, start=4))
    assert len(rest) == 2
    for (x, y), (x2, y2) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_all_loaders_give_the_same_batches():
    batches = [list(make(train=True, seed=5, flip=True).epoch(2)) for make in LOADERS.values()]
    for others in batches[1:]:
        for (x, y), (x2, y2) in zip(batches[0], others, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_evaluation_sees_every_image_once_in_order_and_unmirrored(make):
    loader = make(train=False, seed=5, flip=True)
    assert labels_of(loader, 0) == list(range(53))
    assert loader.plan(0).flip is None
    assert len(loader) == 7


def test_take_and_subset():
    loader = ResidentLoader(Subset(source(), 5), 2, CPU, train=False)
    assert labels_of(loader, 0) == [0, 13, 26, 39, 52]
    assert torch.cat([y for _, y in loader.take(torch.tensor([4, 0]))]).tolist() == [52, 0]


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="--batch_size 64 is more than the 53 training images"):
        ResidentLoader(source(), 64, CPU, train=True)


def test_a_folder_of_images(tmp_path):
    colours = [(i * 10, 0, 0) for i in range(20)]
    for i, colour in enumerate(colours):
        Image.new("RGB", (40, 20 + i), colour).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    read = DATASETS["folder"].read
    train, test = (read(options(split, root=tmp_path, image_size=8)) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)
    image, _ = test[0]
    assert image.shape == (3, 8, 8)
    assert image[:, 4, 4].tolist() == list(colours[9])
    for split, n in (("train", 3), ("test", 1)):
        (tmp_path / split).mkdir()
        for i in range(n):
            Image.new("L", (8, 8), i).save(tmp_path / split / f"{i}.jpg")
    assert [len(read(options(split, root=tmp_path))) for split in ("train", "test")] == [3, 1]
    (tmp_path / "test" / "0.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0\.jpg is not a readable image"):
        read(options("test", root=tmp_path))[0]
    with pytest.raises(FileNotFoundError, match=r"--dataset folder: not found.*your images"):
        read(options(root=tmp_path / "nothing"))


def test_what_is_made_ahead_is_the_same_and_ends_with_whoever_asked():
    made, closed = [], []

    def numbers(fails_at: int = -1):
        try:
            for i in range(9):
                if i == fails_at:
                    raise ValueError("image 3")
                made.append((i, threading.current_thread() is threading.main_thread()))
                yield i
        finally:
            closed.append(True)

    assert list(prefetched(numbers(), depth=3)) == list(range(9))
    assert made == [(i, False) for i in range(9)]

    made.clear()
    part = prefetched(numbers(), depth=2)
    assert [next(part), next(part)] == [0, 1]
    part.close()
    assert 2 <= len(made) <= 4
    assert len(closed) == 2
    with pytest.raises(ValueError, match="image 3"):
        list(prefetched(numbers(fails_at=3)))
    assert len(closed) == 3


@pytest.mark.parametrize("mode", ["auto", "pad", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(3, 28, 28), (5, 1, 28, 20), (2, 3, 50, 71), (3, 30, 45), (1, 31, 31)])
def test_resizing_gives_torchvisions_pixels(mode, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layouts = [images, images.transpose(-1, -2).contiguous().transpose(-1, -2)]
    if images.dim() == 3:
        layouts.append(images.permute(1, 2, 0).contiguous().permute(2, 0, 1))  # as files are decoded
    for size in (32, 16):
        fits = max(shape[-2:]) <= size
        if mode == "pad" and not fits:
            continue
        for x in layouts:
            if mode == "pad" or (mode == "auto" and fits and size - min(shape[-2:]) <= 4):
                left, top = (size - shape[-1]) // 2, (size - shape[-2]) // 2
                expected = TF.pad(x, [left, top, size - shape[-1] - left, size - shape[-2] - top])
            else:
                how = InterpolationMode.BICUBIC if mode == "bicubic" else InterpolationMode.BILINEAR
                expected = TF.resize(x, [size, size], how, antialias=True)
            found = resize(x, size, mode)
            assert found.dtype == torch.uint8
            assert torch.equal(found, expected)


def test_bicubic_overshoot_stays_in_range():
    edge = torch.zeros(1, 40, 40, dtype=torch.uint8)
    edge[:, :, 20:] = 255
    expected = TF.resize(edge, [23, 23], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(resize(edge, 23, "bicubic"), expected)
    assert expected.min() == 0
    assert expected.max() == 255


class Greys(ImageSource):
    """Give image i the grey level i and the label 10 i, by the two methods that a source must have."""

    def __len__(self):
        return 12

    def gather(self, rows):
        images = rows.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
        return images.contiguous(), rows * 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_needs_two_methods_for_every_loader_that_decodes_nothing(workers):
    assert choose_loader("auto", Greys(), CPU) == ("resident", "")
    options = {"train": True, "seed": 3, "flip": True}
    resident = make_loader("resident", Greys(), 4, CPU, **options)
    streamed = make_loader("torch", Greys(), 4, CPU, num_workers=workers, **options)
    for (x, y), (x2, y2) in zip(resident.epoch(1), streamed.epoch(1), strict=True):
        assert torch.equal((x[:, 0, 0, 0] * 2550).round().long(), y)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert (resident.note, resident.left_out) == ("", [])
    subset = limited(Greys(), 3)
    assert torch.cat([y for _, y in ResidentLoader(subset, 2, CPU, train=False).epoch()]).tolist() == [
        0,
        60,
        110,
    ]
    assert [int(subset[i][1]) for i in range(3)] == [0, 60, 110]
    assert not hasattr(subset, "factors")


def test_a_dataset_s_sources_are_image_sources(tmp_path):
    for name in ("sprites", "digits"):
        source = DATASETS[name].read(options(root=tmp_path, image_size=16))
        image, label = source[5]
        images, labels = source.gather(torch.tensor([5]))
        assert torch.equal(image, images[0])
        assert int(label) == int(labels[0])
        assert hasattr(source, "factors") == bool(DATASETS[name].factor_names) == (name == "sprites")


def test_torchvision_is_imported_where_a_set_of_its_own_is_read_and_nowhere_else(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from movae_fast.data import DATASETS, ReadOptions, make_loader
cpu = torch.device("cpu")
for name in ("sprites", "digits"):
    options = ReadOptions(Path(sys.argv[1]), "test", 32, False, cpu)
    next(iter(make_loader("resident", DATASETS[name].read(options), 2, cpu, train=False).epoch()))
assert "torchvision" not in sys.modules
try:
    DATASETS["mnist"].read(options)
except FileNotFoundError:
    assert "torchvision" in sys.modules
else:
    raise AssertionError("read nothing")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
