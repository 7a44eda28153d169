"""Tell which objectives can be added to a model's own, with their weights; torch is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movae_fast.choices import Extra, LatentKind


@dataclass(frozen=True)
class ExtraInfo:
    """Hold the objectives that one name adds, in order with their default weights."""

    objectives: dict[str, float]
    latents: tuple[LatentKind, ...] = ("vector", "codebook", "hierarchy")  # of models that it can be added to


# Of DIP-VAE: lambda_od 10, with lambda_d 10 times it (I) or the same (II), of Locatello et al. 2019.
EXTRAS: dict[Extra, ExtraInfo] = {
    "dip_i": ExtraInfo({"off_diagonal": 10.0, "diagonal": 100.0}, ("vector",)),
    "dip_ii": ExtraInfo({"off_diagonal": 10.0, "diagonal": 10.0}, ("vector",)),
    "factor": ExtraInfo({"adversarial_tc": 10.0}, ("vector",)),
    # MO-VAE's gradient-guided objectives, and those of its models that pass an image through the encoder again.
    "edges": ExtraInfo({"edge_weighted": 1.0, "edge_matching": 1.0}),
    "recursive_kl": ExtraInfo({"recursive_kl": 0.00025}, ("vector",)),
    "cycle": ExtraInfo({"cycle": 0.00025}, ("vector",)),
    "gan": ExtraInfo({"adversarial": 0.1}),
    "l1": ExtraInfo({"l1": 1.0}),
    "lpips": ExtraInfo({"lpips": 1.0}),
}

# Those whose gradient reaches the encoder past the features, which then cut the network in two no longer.
SECOND_PASSES: tuple[Extra, ...] = ("recursive_kl", "cycle")


def extra_objectives(names: Sequence[Extra]) -> dict[str, float]:
    """Return the objectives that these names add, in order with their default weights."""
    return {name: weight for extra in names for name, weight in EXTRAS[extra].objectives.items()}
