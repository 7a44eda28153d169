"""Measure distances between sets of images: FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018).

The features are the 2,048 of the Inception network on which the published metrics are based, in
torch-fidelity's PyTorch version. The user provides the file of its weights; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from movae_fast.names import ArgumentError, first_line

SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
FEATURES = 2048
SUBSETS, SUBSET = 100, 1000  # KID: the published numbers


def require() -> None:
    """Raise ArgumentError if torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ArgumentError("fid_weights needs torch-fidelity: pip install 'movae-fast[metrics]'")


def load_inception(path: Path, device: torch.device) -> nn.Module:
    """Load the feature network, which maps uint8 images [N, 3, H, W] to a tuple with features [N, 2048]
    float32.

    Raises ArgumentError for a file that is missing or does not hold these weights.
    """
    require()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if not path.is_file():
        raise ArgumentError(f"fid_weights {path}: no such file; it is {SOURCE}")
    try:
        torch.load(path, weights_only=True)  # the library would run what a pickle holds
        made = FeatureExtractorInceptionV3("inception", [str(FEATURES)], str(path))
    except Exception as error:  # whatever a file of another kind makes of the reader
        raise ArgumentError(
            f"fid_weights {path} is not torch-fidelity's Inception, which is {SOURCE}: {first_line(error, '')}"
        ) from None
    return made.to(device)


@torch.no_grad()
def features_of(inception: Callable[[Tensor], tuple[Tensor, ...]], batches: Iterable[Tensor]) -> Tensor:
    """Return a network's features [N, F] of batches of images [B, C, H, W] in [0, 1], with one or three
    channels.

    Images are first rounded to 8-bit pixels.
    """
    features = []
    for images in batches:
        pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        (part,) = inception(pixels.expand(-1, 3, -1, -1))
        features.append(part)
    return torch.cat(features)


def distances(real: Tensor, fake: Tensor, seed: int) -> dict[str, float]:
    """Return FID, and KID with its standard deviation over subsets, between features [N, 2048] and [M, 2048].

    They are computed by torchmetrics. KID's subsets, drawn with the seed, have 1,000 images, or as many as
    there are.
    """
    from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

    identity = nn.Identity()
    identity.num_features = real.shape[1]  # type: ignore[assignment]
    fid = FrechetInceptionDistance(feature=identity).to(real.device)
    size = min(SUBSET, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save"
        )  # they are kept anyway
        kid = KernelInceptionDistance(feature=identity, subsets=SUBSETS, subset_size=size).to(real.device)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, deviation = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(deviation)}
