"""`--binarize`: its draws' distribution, what they depend on, and what they do not."""

import itertools
import math

import pytest
import torch

from movae_fast.data import Binarizer, Images, ResidentLoader, TorchLoader, limited
from movae_fast.data.binarize import hash32
from movae_fast.training.build import make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.evaluate import mean_image

CPU = torch.device("cpu")
GREYS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(4000, 1, 1, 1)


def source(n=60):
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)
    return Images(images, torch.arange(n))


def loader(kind=ResidentLoader, mode="dynamic", seed=5, train=True, batch=10, **options):
    torch.manual_seed(0)
    binarizer = Binarizer(mode, "train" if train else "test", seed)
    return kind(source(), batch, CPU, train=train, seed=seed, binarizer=binarizer, **options)


def epoch(made, number=0, start=0):
    images, labels = zip(*made.epoch(number, start), strict=True)
    return torch.cat(images), torch.cat(labels)


def by_label(images, labels):
    return images[labels.argsort()]


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_pixel_is_white_with_probability_its_grey_level(mode):
    white = Binarizer(mode, "train", 3)(GREYS, torch.arange(4000), 7).double() / 255
    assert white.unique().tolist() == [0, 1]
    chance = torch.arange(256).double() / 255
    found = white.mean(0).flatten()
    assert float(found[0]) == 0
    assert float(found[255]) == 1
    # 5 standard errors: one of 256 levels is out once in 7000 tests, and the seed is fixed.
    assert bool(((found - chance).abs() <= 5 * (chance * (1 - chance) / 4000).sqrt()).all())
    # Pixels of an image are independent of one another, and images of one another.
    residual = (white.flatten(1) - chance)[:, 1:255] / (chance * (1 - chance)).sqrt()[1:255]
    for a, b in ((residual[:, :-1], residual[:, 1:]), (residual[:-1], residual[1:])):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


def test_threshold():
    found = Binarizer("threshold", "train", 0)(GREYS[:1], torch.zeros(1, dtype=torch.long), 0)
    assert torch.equal(found, (GREYS[:1] >= 128).to(torch.uint8) * 255)


def test_without_it_grey_levels_stay():
    images, labels = epoch(loader(mode="none"))
    assert torch.equal(by_label(images, labels), loader().source.images.float() / 255)


def test_static_is_one_data_set_and_dynamic_a_new_one_every_epoch():
    static = [by_label(*epoch(loader(mode="static", seed=s), n)) for s, n in ((5, 0), (5, 1), (6, 0))]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(static))
    dynamic = [by_label(*epoch(loader(seed=s), n)) for s, n in ((5, 0), (5, 1), (6, 0))]
    for a, b in itertools.combinations([*dynamic, static[0]], 2):
        assert float((a != b).float().mean()) > 0.2  # a third of pixels of random grey differ between two draws
    assert torch.equal(dynamic[0], by_label(*epoch(loader())))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_test_images_are_drawn_once(mode):
    draws = [epoch(loader(mode=mode, train=False, seed=s), n)[0] for s, n in ((5, 0), (5, 3), (6, 0))]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    taken = torch.cat([x for x, _ in loader(mode=mode, train=False).take(torch.tensor([7, 2]))])
    assert torch.equal(taken, draws[0][[7, 2]])


def test_batches_ranks_loaders_mirroring_and_a_restart_do_not_change_a_draw():
    whole, labels = epoch(loader(), 2)
    assert torch.equal(epoch(loader(), 2, start=4)[0], whole[40:])
    assert torch.equal(epoch(loader(TorchLoader), 2)[0], whole)
    halves = [epoch(loader(batch=5, rank=r, world=2), 2) for r in (0, 1)]
    shared = by_label(torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves]))
    assert torch.equal(shared, by_label(whole, labels))
    mirrored, _ = epoch(loader(flip=True), 2)
    same = (mirrored == whole).flatten(1).all(1)
    assert 0 < int(same.sum()) < len(whole)
    assert torch.equal(mirrored[~same], whole[~same].flip(3))


def test_the_mixing_is_one_to_one_and_the_same_for_numbers_and_tensors():
    n = 1 << 16
    for start in (0, 1 << 20, (1 << 32) - n):
        values = hash32(torch.arange(start, start + n))
        assert len(values.unique()) == n
        assert int(values.min()) >= 0
        assert int(values.max()) < 1 << 32
        assert [hash32(start), hash32(start + 1)] == values[:2].tolist()


def test_the_flag_reaches_the_images():
    values = {"dataset": "digits", "binarize": "dynamic", "device": "cpu", "seed": 1, "limit_train": 200}
    config = TrainConfig.from_flat(values)
    validate(config)
    made = make_loader(config, CPU, "train")
    images, _ = next(made.epoch(0))
    assert images.unique().tolist() == [0, 1]
    # The mean of the draws is the mean of the grey levels; a threshold's is its own.
    grey = TrainConfig.from_flat(values | {"binarize": "none"})
    validate(grey)
    assert torch.equal(mean_image(made), mean_image(make_loader(grey, CPU, "train")))
    above = make_loader(
        TrainConfig.from_flat(vars(config.data) | values | {"binarize": "threshold"}), CPU, "train"
    )
    plain = limited(above.source, 0)
    exact = (plain.gather(torch.arange(len(plain)))[0] > 127).double().mean(0)
    torch.testing.assert_close(mean_image(above), exact)
