"""Make the networks by whose features sets of images are compared, and keep those of reference images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from movae_fast.evaluation.inception import FEATURES, features_of, load_inception
from movae_fast.files import replacing
from movae_fast.names import ArgumentError, first_line

RANDOM_WIDTHS = (16, 32, 64)
SEED = 0  # of the random network: the same one everywhere


@dataclass(frozen=True)
class FeatureNetwork:
    """Hold a network from uint8 images [N, 3, H, W] to a tuple of features [N, F], and what it is."""

    net: Callable[[Tensor], tuple[Tensor, ...]]
    name: str
    digest: str  # of its weights
    resizer: str
    width: int | None  # F, where it is known before use


class RandomNetwork(nn.Module):
    """Compute 64 features by three random convolutions and a mean over the image, the same in every process.

    For comparisons of models with each other and for tests: its distances are not those of any publication.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        channels = (3, *RANDOM_WIDTHS)
        for i, (a, b) in enumerate(zip(channels, RANDOM_WIDTHS, strict=False)):
            self.register_buffer(f"weight_{i}", torch.randn(b, a, 3, 3, generator=generator) / (3 * a**0.5))

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        x = pixels.float() / 127.5 - 1
        for i in range(len(RANDOM_WIDTHS)):
            x = nn.functional.leaky_relu(
                nn.functional.conv2d(x, self.get_buffer(f"weight_{i}"), padding=1), 0.2
            )
            x = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        return (x.mean((2, 3)),)


def load_network(name: str, device: torch.device) -> FeatureNetwork:
    """Return the network called `random`, or that of a TorchScript file.

    The file's network takes uint8 images [N, 3, H, W] and returns features [N, F]. Raises ArgumentError for a
    file that is missing or not TorchScript.
    """
    if name == "random":
        made = RandomNetwork().to(device)
        digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in made.buffers())).hexdigest()
        return FeatureNetwork(made, "random convolutions, seed 0", digest, "none", RANDOM_WIDTHS[-1])
    path = Path(name).expanduser()
    if not path.is_file():
        raise ArgumentError(f"feature_network {name}: no such file; give a TorchScript file, or random")
    try:
        script = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # whatever a file of another kind makes of the reader
        raise ArgumentError(f"feature_network {name} is not TorchScript: {first_line(error, '')}") from None

    def call(pixels: Tensor) -> tuple[Tensor]:
        return (script(pixels).flatten(1).float(),)

    return FeatureNetwork(call, path.name, file_digest(path), "the network's own", None)


def inception_network(path: Path, device: torch.device) -> FeatureNetwork:
    """Return torch-fidelity's Inception with the weights of a file. Raises as `load_inception`."""
    net = load_inception(path, device)
    return FeatureNetwork(
        net, "Inception, torch-fidelity's", file_digest(path), "299, TensorFlow 1's", FEATURES
    )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def reference_features(
    network: FeatureNetwork, batches: Callable[[], Iterable[Tensor]], show: Callable[..., Iterable[Tensor]]
) -> tuple[Tensor, str]:
    """Return the features of images in [0, 1] and the SHA-256 of their pixels.

    batches: gives the images anew at each call. Features are kept in the user's cache folder, under the hash of
    pixels and network; where they are there, the images are read once and the network is not run.
    """
    digest = hashlib.sha256()
    device = torch.device("cpu")
    for images in batches():
        device = images.device
        digest.update((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes())
    pixels = digest.hexdigest()
    key = hashlib.sha256(f"{pixels} {network.digest}".encode()).hexdigest()
    path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "movae" / f"features-{key}.npy"
    with suppress(OSError, ValueError):
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(device), pixels
    features = features_of(network.net, show(batches()))
    # If the home folder cannot be written, the next evaluation takes longer; this one goes on.
    with suppress(OSError), replacing(path) as file:
        np.save(file, features.float().cpu().numpy())
    return features, pixels
