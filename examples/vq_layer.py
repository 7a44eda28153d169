"""A vector-quantised autoencoder with the layer as a drop-in: scikit-learn's digits as 2x2 maps of codes.

    python examples/vq_layer.py --steps 500

The layer has the interface of vector-quantize-pytorch's `VectorQuantize`. Its codebook follows a moving average
of the encoder's output, begins with k-means, and revives codes that nobody chooses.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from movae_fast.nn import VectorQuantizer


class Autoencoder(nn.Module):
    """Images [B, 1, 8, 8] to codes [B, 2, 2] and back."""

    def __init__(self, dim: int = 16, codes: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, dim, 4, stride=2, padding=1)
        )
        self.quantizer = VectorQuantizer(
            dim, codes, accept_image_fmap=True, kmeans_init=True, threshold_ema_dead_code=2
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(dim, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction [B, 1, 8, 8], the indices [B, 2, 2] and the commitment loss []."""
        quantized, indices, commitment = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, commitment


def perplexity(indices: Tensor, codes: int) -> float:
    """Return exp of the entropy of the codes' frequencies: how many are in use, in effect."""
    p = torch.bincount(indices.flatten(), minlength=codes) / indices.numel()
    return float((-torch.special.xlogy(p, p).sum()).exp())


def main(steps: int = 500, codes: int = 64, log_every: int = 50) -> tuple[list[float], float]:
    """Train; return the logged squared errors per image and the perplexity over all images."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8] in [0, 1]
    model = Autoencoder(codes=codes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    errors = []
    for step in range(steps):
        x = images[torch.randint(len(images), (128,))]
        optimizer.zero_grad()
        image, _, commitment = model(x)
        error = (image - x).square().sum((1, 2, 3)).mean()
        (error + commitment).backward()
        optimizer.step()
        if step % log_every == 0 or step == steps - 1:
            errors.append(error.item())
            print(f"step {step:4d}  squared error {errors[-1]:6.3f}  commitment {commitment.item():.4f}")

    model.eval()
    with torch.no_grad():
        _, indices, _ = model(images)
    used = perplexity(indices, codes)
    print(f"perplexity {used:.1f} of {codes} codes")
    return errors, used


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
