"""Measure a trained model of sentences by metrics with names, for `movae evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from movae_fast.data.text import TextLoader
from movae_fast.data.text.lstm_text import generating_network
from movae_fast.data.text.vocabulary import SPECIALS
from movae_fast.evaluation.measure import Report, spaced_rows
from movae_fast.evaluation.text import importance_weighted_nll, measure_text, perplexity
from movae_fast.evaluation.text_oracle import true_log_likelihood
from movae_fast.models import LSTMVAE
from movae_fast.objectives import LossVector
from movae_fast.training.build import make_text_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.evaluate import evaluate

ON_TEXT = ("objectives", "elbo")


def measure_sentences(
    trained: TrainConfig,
    model: LSTMVAE,
    names: Sequence[str],
    device: torch.device,
    seed: int = 0,
    iw: int = 0,
    iw_sentences: int = 256,
    oracle: bool = False,
) -> Report:
    """Compute the named metrics of a model in evaluation mode on the test split, in nats per sentence.

    iw: draws of the importance-weighted bound on -log p(x) of `iw_sentences` evenly spaced sentences, and of
    the perplexity per token; 0 leaves it out. oracle: of `lstm_text` also the true -log p(x) of these
    sentences, and how far the bound is above it.
    """
    loader, report = make_text_loader(trained, device, "test"), Report()
    if "objectives" in names:
        n_data = len(loader.source)
        losses = LossVector(
            model, trained.weights(), trained.objective.recons_dist, trained.reduction, n_data=n_data
        )
        metrics = evaluate(model, losses, loader, seed)
        report.metrics |= {name.removeprefix("test/"): value for name, value in metrics.items()}
    if "elbo" in names:
        report.metrics |= vars(measure_text(model, loader.epoch(), seed))
    if iw:
        report.metrics |= bounds(model, loader, iw, iw_sentences, oracle, seed)
    return report


def bounds(
    model: LSTMVAE, loader: TextLoader, draws: int, count: int, oracle: bool, seed: int
) -> dict[str, float]:
    """Return the mean importance-weighted bound of evenly spaced sentences and its perplexity; with `oracle`
    the truth too."""
    rows = spaced_rows(loader, count)
    nll, tokens = importance_weighted_nll(model, loader.take(rows), draws, seed)
    metrics = {f"iw_nll_{draws}": float(nll.mean()), f"iw_perplexity_{draws}": perplexity(nll.sum(), tokens)}
    if oracle:
        words = loader.source.gather(rows)[0][:, 1:-1] - len(SPECIALS)
        true = -true_log_likelihood(generating_network(), words).log_likelihood
        metrics |= {"oracle_nll": float(true.mean()), "gap_to_oracle": float((nll - true.to(nll)).mean())}
    return metrics
