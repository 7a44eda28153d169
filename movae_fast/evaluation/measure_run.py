"""Measure a trained model, of images or of text, by every metric that `movae evaluate` has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from movae_fast.choices import Order
from movae_fast.evaluation.feature_networks import FeatureNetwork, inception_network, load_network
from movae_fast.evaluation.measure import Report, measure
from movae_fast.evaluation.metric_choice import chosen_metrics
from movae_fast.evaluation.metric_names import ON_SETS, named
from movae_fast.evaluation.sample_source import find_source
from movae_fast.evaluation.set_scores import Draw, Shown, check_count, set_scores, unshown
from movae_fast.evaluation.text_report import ON_TEXT, measure_sentences
from movae_fast.models import LSTMVAE, VAE
from movae_fast.names import ArgumentError
from movae_fast.objectives.perceptual import load_lpips
from movae_fast.priors.choice import PLAIN, Choice
from movae_fast.training.build import make_loader
from movae_fast.training.config import TrainConfig

IMAGES, SENTENCES = 500, 32  # at a time; published mutual informations are estimated within 32 sentences


@dataclass(frozen=True)
class Wanted:
    """Hold which metrics are wanted, and with what; the names are the flags of `movae evaluate`."""

    metrics: str = "auto"
    samples: int = 10_000
    seed: int = 0
    iw: int = 0
    iw_images: int = 256
    oracle: bool = False
    fid_weights: str | None = None
    feature_network: str | None = None
    lpips_weights: str | None = None
    fid_images: int = 10_000
    prior: str = "auto"
    order: Order = "halton"


def rows_at_once(trained: TrainConfig, batch_size: int | None) -> int:
    """Return how many images or sentences are evaluated at a time: the number given, or the usual one."""
    return batch_size or (SENTENCES if trained.is_text else IMAGES)


def measure_run(
    wanted: Wanted,
    trained: TrainConfig,
    model: VAE,
    folder: Path,
    device: torch.device,
    shown: Shown = unshown,
) -> Report:
    """Compute the wanted metrics of a model in evaluation mode, on the test split that its configuration names.

    folder: where fitted priors are looked for. shown: passes batches on and shows progress. Raises
    ArgumentError for a metric or a setting that does not apply to the model or its data, before any long work.
    """
    if isinstance(model, LSTMVAE):
        return of_sentences(wanted, trained, model, device)
    return of_images(wanted, trained, model, folder, device, shown)


def of_sentences(wanted: Wanted, trained: TrainConfig, model: LSTMVAE, device: torch.device) -> Report:
    """Return the metrics of a text model. Raises ArgumentError for a metric or setting that applies to images
    only."""
    for name in ("fid_weights", "feature_network", "lpips_weights"):
        if getattr(wanted, name):
            raise ArgumentError(f"{name} is for metrics of images, and this run is on text; leave it out")
    names = list(ON_TEXT) if wanted.metrics in ("auto", "all") else named(wanted.metrics)
    if others := [name for name in names if name not in ON_TEXT]:
        raise ArgumentError(f"metrics {others[0]} is of images; a run on text has {', '.join(ON_TEXT)}")
    if wanted.oracle and (trained.data.dataset != "lstm_text" or not wanted.iw):
        raise ArgumentError(
            "oracle is the true likelihood of the bound's sentences: it needs iw draws, and a run on lstm_text"
        )
    return measure_sentences(
        trained, model, names, device, wanted.seed, wanted.iw, wanted.iw_images, wanted.oracle
    )


def of_images(
    wanted: Wanted, trained: TrainConfig, model: VAE, folder: Path, device: torch.device, shown: Shown
) -> Report:
    """Return the metrics of an image model."""
    if wanted.oracle:
        raise ArgumentError("oracle is for runs on lstm_text, whose true likelihood is known; leave it out")
    names = chosen_metrics(wanted.metrics, trained, model, wanted.iw)
    network = feature_network(wanted, device)
    scores = [name for name in names if name in ON_SETS]
    if network is not None and scores:  # before work; those that nobody named are given for any number
        fewest = min(wanted.fid_images, len(make_loader(trained, device, "test").source))
        check_count(scores, fewest, network.width)
    source, draw = samples_of(wanted.prior, wanted.order, folder, trained, model)
    others = [name for name in names if name not in ON_SETS]
    lpips = load_lpips(Path(wanted.lpips_weights).expanduser(), device) if wanted.lpips_weights else None
    report = measure(
        trained, model, others, device, wanted.samples, wanted.seed, wanted.iw, wanted.iw_images, lpips
    )
    if network is not None:
        scored = set_scores(
            trained,
            model,
            network,
            scores or ["fid", "kid"],
            device,
            wanted.fid_images,
            trained.data.eval_batch_size or trained.data.batch_size,
            wanted.seed,
            draw,
            source,
            shown,
        )
        report.metrics |= scored.metrics
        report.conditions = scored.conditions
    return report


def feature_network(wanted: Wanted, device: torch.device) -> FeatureNetwork | None:
    """Return the network by whose features sets of images are compared; None where none is wanted."""
    if wanted.fid_weights:
        return inception_network(Path(wanted.fid_weights).expanduser(), device)
    return load_network(wanted.feature_network, device) if wanted.feature_network else None


def samples_of(
    prior: str, order: Order, folder: Path, trained: TrainConfig, model: VAE
) -> tuple[str, Draw | None]:
    """Return where samples come from, in words, and how to draw them; None of codes without a fitted prior.

    Codes that are drawn by their usage alone are no samples of a model. Raises ArgumentError for a prior that
    does not fit.
    """
    source, choice = find_source(folder, trained, model, prior), Choice(order=order)
    source.check(choice)
    if not source.is_prior:
        return "none: codes have no fitted prior (movae prior RUN fits one)", None
    in_order = "" if order == PLAIN.order else f", places by {order}"
    return source.sentence + in_order, partial(source.images, choice=choice)
