"""The transformer over codes: its cache, its causality, its probabilities, and what it learns."""

from __future__ import annotations

import math

import pytest
import torch

from movae_fast.priors.cached_steps import CachedSteps
from movae_fast.priors.choice import Choice, pick, probabilities
from movae_fast.priors.codes import Grid
from movae_fast.priors.draw_codes import draw_codes, draw_codes_again
from movae_fast.priors.transformer import CausalPrior

ONE = (Grid(4, 4, 12),)
TWO = (Grid(2, 3, 7), Grid(4, 3, 12))  # two maps with vocabularies of their own


def prior_over(grids, classes=0, **sizes):
    torch.manual_seed(0)
    made = CausalPrior(grids, **({"width": 64, "depth": 2, "dropout": 0.0} | sizes), classes=classes).eval()
    for parameter in made.parameters():  # far from their start, where all logits are nearly alike
        if parameter.dim() > 1:
            parameter.data.mul_(8)
        parameter.requires_grad_(False)
    return made


def random_codes(grids, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randint(g.codes, (n, g.places), generator=generator) for g in grids], 1)


@pytest.mark.parametrize("grids", [ONE, TWO])
@pytest.mark.parametrize("masked", [False, True], ids=["sliced", "masked"])
def test_cached_logits_are_those_of_the_whole_sequence(grids, masked):
    """As the CPU reads the cache, and as a CUDA graph does."""
    prior = prior_over(grids, classes=3)
    codes, label = random_codes(grids, 5), torch.tensor([0, 1, 2, -1, 0])
    whole = prior.logits(codes, label)
    assert max(float(w.std(-1).min()) for w in whole) > 0.1  # the logits say something
    cached, x = CachedSteps(prior, 5), prior.label_vectors(label, 5)
    for number, each in enumerate(whole):
        here = prior.places_of(number)
        for t in range(here.start, here.stop):
            span = None if masked else t + 1
            logits = cached.logits(x, torch.tensor([t]), span, number)
            torch.testing.assert_close(logits, each[:, t - here.start], atol=1e-4, rtol=0)
            x = prior.tokens(codes[:, t] + prior.starts[number])


def test_probabilities_sum_to_one_over_all_sequences():
    """Every sequence of three codes, one map of two and one of one: the likelihoods are a distribution."""
    grids = (Grid(1, 2, 3), Grid(1, 1, 4))
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(4))
    prior = prior_over(grids)
    assert torch.exp(-prior.nats(every).double()).sum().item() == pytest.approx(1, abs=1e-6)
    assert prior.nats(every).std() > 0.1


@pytest.mark.parametrize("grids", [ONE, TWO])
def test_logits_do_not_depend_on_what_comes_after(grids):
    prior, codes = prior_over(grids), random_codes(grids, 4)
    for t in (0, 3, codes.shape[1] - 2):
        changed = codes.clone()
        changed[:, t + 1 :] = random_codes(grids, 4, seed=2)[:, t + 1 :]
        before, after = (prior.hidden(c, None)[:, : t + 2] for c in (codes, changed))
        torch.testing.assert_close(before[:, : t + 2], after, atol=1e-5, rtol=0)
        changed[:, t] = (codes[:, t] + 1) % grids[0].codes  # and do on the one before
        assert (prior.hidden(changed, None)[:, t + 1] - before[:, t + 1]).abs().max() > 1e-2


@pytest.mark.parametrize("grids", [ONE, TWO])
@pytest.mark.parametrize("choice", [Choice(), Choice(0.7, 3, 0.9, 2.0)], ids=["plain", "guided"])
def test_the_cache_changes_no_draw(grids, choice):
    prior = prior_over(grids, classes=3)
    uniform = torch.rand(6, prior.length, generator=torch.Generator().manual_seed(4))
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    codes = draw_codes(prior, uniform, label, choice)
    assert torch.equal(codes, draw_codes_again(prior, uniform, label, choice))
    assert codes.unique().numel() > 3


def test_draws_follow_the_likelihood():
    """Frequencies of every sequence of two codes against their probabilities, to five standard errors."""
    prior, n = prior_over((Grid(1, 2, 3),)), 20_000
    codes = draw_codes(prior, torch.rand(n, 2, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9)
    p = torch.exp(-prior.nats(torch.cartesian_prod(torch.arange(3), torch.arange(3))).double())
    assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()


def test_choices_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = {"top_k": (Choice(top_k=2), 2), "top_p": (Choice(top_p=0.81), 3), "first": (Choice(top_p=0.2), 1)}
    for choice, count in kept.values():
        assert int((probabilities(logits, choice) > 0).sum()) == count
    cold = probabilities(logits, Choice(temperature=0.5))
    torch.testing.assert_close(cold, (p := logits.exp().double() ** 2) / p.sum(), atol=1e-6, rtol=0)
    # A number at either end of [0, 1) picks a code that has probability.
    ends = torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64)
    assert pick(torch.tensor([[0.0, 0.4, 0.6, 0.0]] * 2, dtype=torch.float64), ends).tolist() == [1, 2]


def test_a_memorised_set_costs_nothing():
    """Twelve images known by heart: what is left is which of them it is, log 12 nats per image."""
    torch.manual_seed(0)
    prior, codes = CausalPrior(ONE, 64, 2, 0.0), random_codes(ONE, 12)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        prior.loss(codes, torch.zeros(12), torch.zeros(12, 1)).backward()
        optimizer.step()
    assert prior.nats(codes).mean().item() == pytest.approx(math.log(12), abs=0.1)
    labelled = CausalPrior(ONE, 64, 2, 0.0, classes=12, label_dropout=0.0)
    optimizer = torch.optim.AdamW(labelled.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        labelled.loss(codes, torch.arange(12), torch.zeros(12, 1)).backward()
        optimizer.step()
    assert labelled.nats(codes, torch.arange(12)).mean().item() < 0.05
