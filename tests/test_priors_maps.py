"""MaskGIT and the gated PixelCNN over maps of codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from movae_fast.priors.choice import PLAIN, Choice
from movae_fast.priors.codes import Grid
from movae_fast.priors.maskgit import MaskedPrior, draw_masked, halton_order, masked_at
from movae_fast.priors.pixelcnn import PixelCNNPrior, draw_n

TWO = (Grid(2, 3, 7), Grid(4, 3, 12))


def frozen(prior, factor=1.0):
    for parameter in prior.parameters():
        parameter.data.mul_(factor if parameter.dim() > 1 else 1).requires_grad_(False)
        parameter.requires_grad_(False)
    return prior.eval()


def pixelcnn(grid, depth, classes=0):
    torch.manual_seed(0)
    return frozen(PixelCNNPrior((grid,), 8, depth, 0.0, classes), 2.0)


def test_the_pixelcnn_sees_every_place_before_and_none_after():
    """By the gradient: no blind spot, nothing of the place itself or behind it."""
    grid = Grid(6, 5, 9)
    prior = pixelcnn(grid, depth=9).double()
    prior.embedding.weight.data.copy_(torch.randn(9, 8))
    codes = torch.randint(9, (1, 30))
    for t in (0, 7, 14, 29):
        embedded = prior.embedding(codes.view(1, 6, 5)).permute(0, 3, 1, 2).requires_grad_()
        v = h = embedded
        known = prior.label(torch.zeros(1, dtype=torch.int64))
        for layer in prior.layers:
            v, h = layer(v, h, known)
        logits = prior.last(prior.head(h)).flatten(2)[0, :, t]
        (grad,) = torch.autograd.grad(logits.square().sum(), embedded)
        seen = grad.abs().sum(1).flatten() > 0
        assert seen.tolist() == [place < t for place in range(30)], t


def test_the_pixelcnns_probabilities_sum_to_one():
    prior = pixelcnn(Grid(1, 3, 3), depth=2)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    assert torch.exp(-prior.nats(every).double()).sum().item() == pytest.approx(1, abs=1e-6)
    assert prior.nats(every).std() > 0.05


def test_the_pixelcnn_samples_what_it_says():
    """Frequencies against probabilities, to five standard errors; with guidance 1 a label changes them."""
    prior, n = pixelcnn(Grid(1, 2, 3), depth=2, classes=2), 20_000
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    for label in (0, 1):
        codes = draw_n(prior, n, torch.Generator().manual_seed(0), torch.full((n,), label), PLAIN)
        counts = torch.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9)
        p = torch.exp(-prior.nats(every, torch.full((9,), label)).double())
        assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()


def test_a_memorised_map_costs_the_pixelcnn_nothing():
    torch.manual_seed(0)
    prior, codes = PixelCNNPrior((Grid(4, 4, 12),), 32, 3, 0.0), torch.randint(12, (6, 16))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        prior.loss(codes, torch.zeros(6), torch.zeros(6, 1)).backward()
        optimizer.step()
    assert prior.nats(codes).mean().item() == pytest.approx(math.log(6), abs=0.15)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (16, 16)])
def test_haltons_order_is_a_permutation_that_spreads(size):
    order = halton_order(*size)
    assert sorted(order) == list(range(size[0] * size[1]))
    if size == (16, 16):  # the first sixteen places: four in each quarter, give or take one
        quarters = [(place // 16 // 8) * 2 + place % 16 // 8 for place in order[:16]]
        assert all(abs(quarters.count(q) - 4) <= 1 for q in range(4))


def test_the_schedule_is_the_cosine():
    progress = torch.tensor([0.0, 0.5, 0.999999])
    assert masked_at(progress, 64).tolist() == [64, math.ceil(64 * math.cos(math.pi / 4)), 1]


def test_masked_logits_see_both_sides_and_not_the_masked_codes():
    torch.manual_seed(0)
    prior = frozen(MaskedPrior(TWO, 64, 1, 0.0), 6.0)
    codes = torch.cat([torch.randint(7, (1, 6)), torch.randint(12, (1, 12))], 1)
    masked = torch.zeros(1, 18, dtype=torch.bool)
    masked[0, [3, 9]] = True
    before = torch.cat([each.flatten() for each in prior.logits(codes, masked)])
    for place, seen in ((0, True), (17, True), (3, False), (9, False)):
        changed = codes.clone()
        changed[0, place] = (codes[0, place] + 1) % 7
        after = torch.cat([each.flatten() for each in prior.logits(changed, masked)])
        assert bool((after - before).abs().max() > 1e-3) == seen, place


@pytest.mark.parametrize("order", ["halton", "confidence"])
@pytest.mark.parametrize("passes", [1, 8, 99])
def test_every_place_is_filled_from_its_own_vocabulary(passes, order):
    torch.manual_seed(0)
    prior = frozen(MaskedPrior(TWO, 64, 1, 0.0, classes=2), 4.0)
    label = torch.ones(50).long()
    drawn = [
        draw_masked(
            prior, 50, torch.Generator().manual_seed(seed), label, Choice(guidance=1.5, order=order), passes
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0][:, :6].max() < 7
    assert drawn[0][:, 6:].max() > 7


def confident_codes(logits_of, uniform, places, passes, noise):
    """Codes [n, T] by confidence, written out: float64 NumPy, image by image and place by place."""
    n = len(uniform[0][0])
    codes, masked = np.zeros((n, places), dtype=np.int64), np.ones((n, places), dtype=bool)
    for k in range(1, passes + 1):
        logits, stay = logits_of(codes, masked), 0
        if k < passes:
            stay = min(math.ceil(math.cos(math.pi / 2 * k / passes) * places), int(masked[0].sum()) - 1)
        for i in range(n):
            scored = []
            for t in np.flatnonzero(masked[i]):
                p = np.exp(logits[i, t] - logits[i, t].max())
                p = p / p.sum()
                code = int(np.searchsorted(np.cumsum(p), uniform[k - 1][0][i, t], side="right"))
                gumbel = -math.log(-math.log(uniform[k - 1][1][i, t]))
                scored.append((math.log(p[code]) + noise * (1 - k / passes) * gumbel, t, code))
            for _, t, code in sorted(scored, reverse=True)[: len(scored) - max(stay, 0)]:
                codes[i, t], masked[i, t] = code, False
    assert not masked.any()
    return codes


@pytest.mark.parametrize("passes", [4, 8])  # of 3, cos(pi / 3) * 12 rounds to either side of 6
def test_the_order_of_confidence_is_the_published_schedule(passes):
    torch.manual_seed(0)
    prior = frozen(MaskedPrior((Grid(4, 3, 9),), 64, 1, 0.0), 5.0)
    generator = torch.Generator().manual_seed(5)
    uniform = [torch.rand(2, 40, 12, generator=generator, dtype=torch.float64).numpy() for _ in range(passes)]

    def logits_of(codes, masked):
        return prior.logits(torch.from_numpy(codes), torch.from_numpy(masked))[0].double().numpy()

    draws = {
        order: draw_masked(
            prior, 40, torch.Generator().manual_seed(5), None, Choice(order=order, order_noise=1.5), passes
        ).numpy()
        for order in ("confidence", "halton")
    }
    expected = confident_codes(logits_of, uniform, 12, passes, 1.5)
    assert np.array_equal(draws["confidence"], expected)
    assert not np.array_equal(draws["halton"], expected)
    assert not np.array_equal(confident_codes(logits_of, uniform, 12, passes, 0.0), expected)


def test_maskgit_learns_what_belongs_together():
    """Two images of one code each: after the first code the rest is known, and both are drawn."""
    torch.manual_seed(0)
    prior = MaskedPrior((Grid(4, 4, 2),), 64, 1, 0.0, label_smoothing=0.0)
    codes, generator = torch.arange(2)[:, None].expand(2, 16), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(100):
        rows = torch.randint(2, (32,), generator=generator)
        optimizer.zero_grad()
        prior.loss(codes[rows], rows, prior.draws(32, generator)).backward()
        optimizer.step()
    drawn = draw_masked(prior.eval(), 40, generator, None, PLAIN, passes=16).float().mean(1)
    assert (torch.maximum(drawn, 1 - drawn) > 0.99).float().mean() > 0.9
    assert 8 < (drawn > 0.5).sum() < 32
