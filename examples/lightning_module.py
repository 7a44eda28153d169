"""A Lightning module whose objectives are aggregated: one of the package's networks, on scikit-learn's digits.

    pip install 'movae-fast[examples]'
    python examples/lightning_module.py --steps 500

Aggregation needs the objectives' gradients one by one, so the module optimizes manually: `jacobian.backward`
takes the place of `manual_backward`. In one process, for the gradients are not exchanged.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from movae_fast import jacobian
from movae_fast.aggregation import UPGrad
from movae_fast.models import build_model
from movae_fast.objectives import LossVector


class MultiObjectiveVAE(pl.LightningModule):
    """A model of `movae_fast.models` with its loss vector, trained by strict UPGrad."""

    def __init__(self, n_data: int, kl_weight: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = build_model("vae", (1, 8, 8), "sigmoid", {"latent_dim": 8, "hidden_dims": [16, 32]})
        self.losses = LossVector(self.model, [1.0, kl_weight], "gaussian", "sum", n_data)
        self.aggregator = UPGrad.strict()
        self.history: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Differentiate each objective, aggregate, step."""
        (x,) = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        features = self.model.encode(x)
        losses = self.losses(self.model.forward_features(features), x)
        weighted = [loss * w for loss, w in zip(losses, self.losses.weights.to(x), strict=True)]
        jacobian.backward(weighted, features=features, aggregator=self.aggregator)
        optimizer.step()
        for name, loss in zip(self.model.objectives, losses, strict=True):
            self.log(f"train/{name}", loss, prog_bar=True)
        self.history.append(losses[0].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=2e-3)


def main(steps: int = 500) -> list[float]:
    """Train; return each step's reconstruction error, the squared error per image."""
    pl.seed_everything(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8] in [0, 1]
    loader = DataLoader(TensorDataset(images), batch_size=128, shuffle=True)
    module = MultiObjectiveVAE(n_data=len(images))
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    print(f"squared error per image: {module.history[0]:.3f} at first, {module.history[-1]:.3f} at last")
    return module.history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
