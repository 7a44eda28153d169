"""Define the gated PixelCNN over a map of codes (van den Oord et al. 2016).

A vertical stack of convolutions sees all rows above a position, and a horizontal stack sees the row to its left
and the vertical stack's output. Together they see every earlier position, without the blind spot of a single
stack of masked convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.priors.choice import Choice, guided, label_rows, pick, probabilities
from movae_fast.priors.codes import Grids
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.transformer import kept_labels, nats_under

KERNEL, FIRST_KERNEL = 3, 7  # sides of the convolutions


def gate(x: Tensor) -> Tensor:  # [B, 2 C, h, w] -> [B, C, h, w]
    """Return tanh of one half of the channels times sigmoid of the other."""
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedLayer(nn.Module):
    """Compute one layer of both stacks of a gated PixelCNN (see this module's docstring).

    A position sees earlier positions and its own features, in the first layer (`first`) earlier positions only:
    there its own features contain the code that is to be predicted.
    """

    def __init__(self, width: int, kernel: int, first: bool, dropout: float) -> None:
        super().__init__()
        self.reach, self.first = kernel // 2, first
        # The map is padded above and to the left, so that a kernel ends at the position's own row and place,
        # which depend on earlier codes only. In the first layer it ends one row above, one place to the left.
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + (not first), kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + (not first)))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.labels = nn.Linear(width, 4 * width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vertical and the horizontal stack's features [B, C, h, w]; `label` [B, C] is added to
        both."""
        r = self.reach
        to_v, to_h = self.labels(label)[:, :, None, None].chunk(2, 1)
        above, left = F.pad(v, (r, r, r, 0)), F.pad(h, (r, 0, 0, 0))
        if self.first:
            above, left = above[:, :, :-1], left[..., :-1]
        down = self.vertical(above)
        across = self.horizontal(left) + self.across(down)
        out = self.out(self.dropout(gate(across + to_h)))
        return gate(down + to_v), out if self.first else h + out


class PixelCNNPrior(nn.Module):
    """Model the codes of one map row by row, each given those before it: exact likelihood."""

    exact = True

    def __init__(
        self, grids: Grids, width: int, depth: int, dropout: float, classes: int = 0, label_dropout: float = 0.1
    ) -> None:
        super().__init__()
        (grid,) = grids
        self.grids, self.grid, self.classes, self.label_dropout = grids, grid, classes, label_dropout
        self.length = grid.places
        self.embedding = nn.Embedding(grid.codes, width)
        self.label = nn.Embedding(classes + 1, width)
        kernels = [FIRST_KERNEL] + [KERNEL] * (depth - 1)
        self.layers = nn.ModuleList(GatedLayer(width, k, i == 0, dropout) for i, k in enumerate(kernels))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 4 * width, 1), nn.ReLU())
        self.last = nn.Conv2d(4 * width, grid.codes, 1)

    def logits(self, codes: Tensor, label: Tensor | None = None) -> Tensor:  # [B, T, K] float32
        """Return the logits of codes [B, T]; those at a position depend only on earlier codes."""
        x = self.embedding(codes.view(-1, self.grid.height, self.grid.width)).permute(0, 3, 1, 2)
        none = torch.full((len(codes),), self.classes, device=codes.device)
        known = self.label(none if label is None else torch.where(label < 0, self.classes, label))
        v, h = x, x
        for layer in self.layers:
            v, h = layer(v, h, known)
        return self.last(self.head(h)).float().flatten(2).transpose(1, 2)

    def nats(self, codes: Tensor, label: Tensor | None = None) -> Tensor:  # [B]
        """Return -log p of the codes [B, T] of each image, in nats."""
        return nats_under([self.logits(codes, label)], codes, self.grids)

    def draws(self, n: int, generator: torch.Generator) -> Tensor:  # [n, 1]
        """Draw the random numbers by which `loss` decides which labels to drop."""
        return torch.rand(n, 1, generator=generator)

    def loss(self, codes: Tensor, label: Tensor, draws: Tensor) -> Tensor:  # []
        """Return the nats per code of a batch, codes [B, T] and labels [B]."""
        known = kept_labels(label, draws, self.label_dropout) if self.classes else None
        return self.nats(codes, known).mean() / self.length


@torch.no_grad()
def draw_n(
    prior: PixelCNNPrior, n: int, generator: torch.Generator, label: Tensor | None, choice: Choice
) -> Tensor:  # [n, T] int64
    """Draw n maps of codes, running the network on the whole map for each code."""
    device = prior.embedding.weight.device
    labels = label_rows(label, n, choice, device)
    uniform = torch.rand(n, prior.length, generator=generator).to(device)
    codes = torch.zeros(n, prior.length, dtype=torch.int64, device=device)
    for t in range(prior.length):
        logits = prior.logits(codes.repeat(len(labels) // n, 1), labels)[:, t]
        codes[:, t] = pick(probabilities(guided(logits, choice.guidance), choice), uniform[:, t])
    return codes


def build(config: PriorConfig, grids: Grids, classes: int) -> PixelCNNPrior:
    """Build the prior that the configuration describes, over one map of codes."""
    sizes = (config.option("width"), config.option("depth"), config.option("dropout"))
    return PixelCNNPrior(grids, *sizes, classes, config.option("label_dropout"))
