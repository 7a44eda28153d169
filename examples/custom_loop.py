"""A training loop of your own whose steps worsen no objective: a VAE on scikit-learn's digits.

    python examples/custom_loop.py --steps 500

`jacobian.backward` takes the place of `loss.backward()`: it differentiates each objective, aggregates the
gradients of the encoder, and fills `.grad`. `jacobian.project_step` then corrects what Adam made of it.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from movae_fast import jacobian
from movae_fast.aggregation import UPGrad

KL_WEIGHT = 0.05  # how much of the update the KL may claim


def objectives(image: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
    """Return the reconstruction's squared error and the KL in nats, each summed per image."""
    reconstruction = (image - x).square().sum(1).mean()
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
    return [reconstruction, kl]


def main(steps: int = 500, latents: int = 8, log_every: int = 50) -> list[list[float]]:
    """Train and return the objectives of the logged steps."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # [1797, 64] in [0, 1]
    # A step that worsens no objective never raises the KL, so an encoder can only spend the nats that it begins
    # with. The BatchNorm makes them about seven; without it they would be nearly none, and nothing would be
    # encoded.
    encoder = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * latents), nn.BatchNorm1d(2 * latents)
    )
    decoder = nn.Sequential(nn.Linear(latents, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    aggregator = UPGrad.strict()
    shared = list(encoder.parameters())  # before the features: every objective's gradient meets there

    logged = []
    for step in range(steps):
        x = images[torch.randint(len(images), (128,))]
        optimizer.zero_grad()

        mu, logvar = features = encoder(x).chunk(2, dim=1)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        reconstruction, kl = objectives(decoder(z), x, mu, logvar)
        weights, rows = jacobian.backward(
            [reconstruction, KL_WEIGHT * kl],
            features=features,
            shared=shared,
            aggregator=aggregator,
            return_rows=True,
        )

        before = jacobian.flatten(shared)
        optimizer.step()
        jacobian.project_step(shared, before, rows, optimizer=optimizer)

        if step % log_every == 0 or step == steps - 1:  # the only values that are read on the host
            applied = before - jacobian.flatten(shared)
            cosine = torch.cosine_similarity(rows, applied[None], dim=1).min()
            logged.append([reconstruction.item(), kl.item()])
            print(
                f"step {step:4d}  squared error {logged[-1][0]:6.3f}  KL {logged[-1][1]:5.2f} nats  "
                f"weights {weights[0].item():.2f} {weights[1].item():.2f}  least cosine {cosine.item():+.4f}"
            )
            assert cosine > -1e-3, "the applied step worsens an objective"
    return logged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
