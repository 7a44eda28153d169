"""Measure the rate-distortion curves of several runs: each run's points, MIG and gates, and the linear oracle's
values at the same betas."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from movae_fast.data import Loader
from movae_fast.data.text import TextLoader
from movae_fast.evaluation.curve_runs import Member
from movae_fast.evaluation.disentanglement import METRICS, Codes
from movae_fast.evaluation.linear_oracle import LinearOracle
from movae_fast.evaluation.measure import factor_images
from movae_fast.evaluation.rate_distortion import (
    against_run,
    curve_points,
    data_covariance,
    encode_at,
    log_spaced,
)
from movae_fast.models import VAE, GaussianVAE
from movae_fast.models.multirate import gated_layers
from movae_fast.training.build import load_model, make_loader, make_text_loader
from movae_fast.training.config import TrainConfig

RESPONSES = 200  # betas of a response function
Responses = tuple[list[float], dict[str, Tensor]]  # betas [N], gated layer -> its values at them [N, C]
# Told the number of a run and how many rows it takes; what it returns is told of rows that are done.
Started = Callable[[int, int], Callable[[int], None]]


def evaluate_runs(
    members: Sequence[Member],
    device: torch.device,
    split: Literal["test", "train"],
    batch_size: int,
    samples: int,
    seed: int,
    started: Started = lambda number, rows: lambda done: None,
) -> dict[str, Responses]:
    """Measure every run's points, in place; return the response functions of the multi-rate runs, by path.

    batch_size: rows of a forward pass, a row being an image at one beta. samples: number of images whose codes
    give MIG, for data with known discrete factors; 0 leaves MIG out. started: called with a run's number and
    its number of rows; returns a function that is called as rows are done.
    """
    gates: dict[str, Responses] = {}
    oracles: dict[int, LinearOracle] = {}
    for number, member in enumerate(members):
        _, model = load_model(member.path, device)
        loader = loader_of(member.config, device, split, batch_size)
        advance = started(number, len(loader.source) * len(member.betas))
        began, dist = time.perf_counter(), member.config.objective.recons_dist
        member.points = curve_points(model, loader, member.betas, dist, seed, batch_size, advance)
        member.seconds = time.perf_counter() - began
        has_factors = not member.config.is_text and bool(member.config.info.factor_sizes)
        if has_factors and samples and isinstance(model, GaussianVAE):
            add_mig(member, model, device, batch_size, samples, seed)
        if isinstance(loader, Loader) and (oracle := oracle_of(member, loader, oracles)) is not None:
            member.beside = [oracle.compare(p.beta, p.rate, p.distortion) for p in member.points]
        if member.multirate:
            gates[str(member.path)] = responses(member, model)
    return gates


def loader_of(config: TrainConfig, device: torch.device, split: str, size: int) -> Loader | TextLoader:
    """Return the split in order, `size` images or sentences at a time."""
    if config.is_text:
        config.data.eval_batch_size = size
        return make_text_loader(config, device, split, in_order=True)
    loader = make_loader(config, device, split, in_order=True)
    loader.batch_size = size
    return loader


def add_mig(
    member: Member, model: GaussianVAE, device: torch.device, batch_size: int, samples: int, seed: int
) -> None:
    """Add MIG to each of the run's points, computed from the posterior means of the same images at each
    beta."""
    member.config.data.limit_train = 0
    loader, rows = factor_images(member.config, device, samples, 0, seed)
    factors = loader.source.factors(rows.to(device))
    for first in range(0, len(member.points), batch_size):
        points = member.points[first : first + batch_size]
        betas = [p.beta for p in points]
        images = max(1, batch_size // len(points))
        with torch.no_grad():
            parts = [encode_at(model, x, betas) for batch, _ in loader.take(rows) for x in batch.split(images)]
        mu, logvar = (torch.cat([p[i] for p in parts], dim=1) for i in (0, 1))
        for k, point in enumerate(points):
            point.mig = METRICS["mig"](Codes(mu[k], logvar[k], factors, len(rows), seed))["mig"]


def oracle_of(member: Member, loader: Loader, known: dict[int, LinearOracle]) -> LinearOracle | None:
    """Return the oracle that computes a run's optimum over the loader's images, if the run is a linear VAE with
    squared error and linear output; else None.

    `known` caches the oracles by number of latents.
    """
    config = member.config
    exact = config.objective.recons_dist == "gaussian" and config.activation == "none"
    if config.model.arch != "linear_vae" or not exact:
        return None
    k = member.latents
    if k not in known:
        one = next(iter(known.values()), None)
        known[k] = one.with_latents(k) if one else LinearOracle(data_covariance(loader), k, "squared_error")
    return known[k]


@torch.no_grad()
def responses(member: Member, model: VAE) -> Responses:
    """Return betas [N] over the run's range, and each gated layer's gate values at them [N, C], on the CPU."""
    betas = log_spaced(member.betas[0], member.betas[-1], RESPONSES)
    logs = torch.tensor(betas, device=model.device).log()
    values = {name: layer.gate_values(logs).cpu() for name, layer in gated_layers(model).items()}
    member.closed = {name: float((v == 0).all(0).double().mean()) for name, v in values.items()}
    return betas, values


def metrics_of(member: Member) -> list[dict[str, float]]:
    """Return the metrics of each point of a run as a dict, including the oracle's."""
    beside = member.beside or [{} for _ in member.points]
    return [p.metrics() | b for p, b in zip(member.points, beside, strict=True)]


def comparisons(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Compare every multi-rate run with every single-beta run, the former minus the latter; see
    `against_run`."""
    return [
        {"curve": str(curve.path), "run": str(plain.path), **against_run(curve.points, plain.points[0])}
        for curve in members
        if curve.multirate
        for plain in members
        if not plain.multirate
    ]
