"""Compare reconstructions and samples with test images, as sets: FID, KID, precision and recall, density and
coverage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data import to_unit
from movae_fast.evaluation.feature_networks import FeatureNetwork, reference_features
from movae_fast.evaluation.inception import SUBSET, distances, features_of
from movae_fast.evaluation.measure import spaced_rows
from movae_fast.evaluation.sample_scores import (
    NEIGHBOURS_OF_COVERAGE,
    NEIGHBOURS_OF_RECALL,
    density_coverage,
    precision_recall,
)
from movae_fast.models import VAE
from movae_fast.names import ArgumentError
from movae_fast.training.build import make_loader
from movae_fast.training.config import TrainConfig

Draw = Callable[[int, int, torch.Generator], Iterator[Tensor]]  # n images of a batch size, in the model's range
Shown = Callable[[Iterable[Tensor], str, int], Iterable[Tensor]]


def unshown(images: Iterable[Tensor], kind: str, batches: int) -> Iterable[Tensor]:
    """Pass the batches on and show nothing."""
    return images


@dataclass(frozen=True)
class SetScores:
    """Hold the scores by name, and what has to stand beside them."""

    metrics: dict[str, float]
    conditions: dict[str, str | int]


def check_count(names: Sequence[str], n: int, width: int | None) -> None:
    """Raise ArgumentError where n images of each kind are fewer than a named score needs."""
    needs = {
        "fid": (width or 0) + 1,  # fewer leave the covariance singular
        "kid": SUBSET,
        "precision_recall": NEIGHBOURS_OF_RECALL + 1,
        "density_coverage": NEIGHBOURS_OF_COVERAGE + 1,
    }
    for name in names:
        if n < needs[name]:
            raise ArgumentError(
                f"metrics {name} needs {needs[name]:,} images; there are {n:,} (fid_images, limit_test)"
            )


def set_scores(
    trained: TrainConfig,
    model: VAE,
    network: FeatureNetwork,
    names: Sequence[str],
    device: torch.device,
    count: int,
    batch_size: int,
    seed: int,
    draw: Draw | None,
    source: str,
    shown: Shown = unshown,
) -> SetScores:
    """Return the named scores of reconstructions, and of samples where there is a `draw`, to evenly spaced test
    images.

    names: of fid, kid, precision_recall, density_coverage. count: test images, at most; as many are made.
    source: where samples come from, in words. shown: passes the batches of one kind on, and shows how many of
    them are done. Raises ArgumentError for fewer test images than two.
    """
    loader = make_loader(trained, device, "test")
    n = min(count, len(loader.source))
    if n < 2:
        raise ArgumentError(f"fid_images: two test images at least are compared; there are {n}")
    rows = spaced_rows(loader, n)
    batches = len(rows.split(batch_size))

    def unit(images: Iterable[Tensor]) -> Iterator[Tensor]:
        return (to_unit(x, loader.normalize) for x in images)

    real, pixels = reference_features(
        network,
        lambda: unit(x for x, _ in loader.take(rows)),
        lambda images: shown(images, "test images", batches),
    )
    made: dict[str, Iterable[Tensor]] = {
        "reconstructions": (model.reconstruct(x) for x, _ in loader.take(rows))
    }
    if draw is not None:
        made["samples"] = draw(n, batch_size, torch.Generator().manual_seed(seed))
    metrics: dict[str, float] = {"fid_images": n}
    with torch.no_grad():
        for kind, images in made.items():
            fake = features_of(network.net, unit(shown(images, kind, batches)))
            values = scores_of(real, fake, names, seed)
            metrics |= {f"{name}_{kind}": value for name, value in values.items()}
    conditions: dict[str, str | int] = {
        "images": n,
        "reference": "test split, evenly spaced",
        "reference_sha256": pixels,
        "features": network.name,
        "features_sha256": network.digest,
        "resizer": network.resizer,
        "samples": source,
    }
    return SetScores(metrics, conditions)


def scores_of(real: Tensor, fake: Tensor, names: Sequence[str], seed: int) -> dict[str, float]:
    """Return the named scores of features [N, F] and [M, F]."""
    values: dict[str, float] = {}
    if "fid" in names or "kid" in names:
        both = distances(real, fake, seed)
        values |= {name: value for name, value in both.items() if name.removesuffix("_std") in names}
    if "precision_recall" in names:
        values["precision"], values["recall"] = precision_recall(real, fake)
    if "density_coverage" in names:
        values["density"], values["coverage"] = density_coverage(real, fake)
    return values
