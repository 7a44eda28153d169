"""Define MaskGIT (Chang et al. 2022): a transformer that sees all positions and predicts the masked codes.

It has no likelihood. Drawing a sample takes a few passes, each of which fills in many positions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast.priors.choice import Choice, guided, label_rows, pick, probabilities
from movae_fast.priors.codes import Grids
from movae_fast.priors.config import PriorConfig
from movae_fast.priors.transformer import CodeTransformer, kept_labels

PASSES = 8  # of a sample
AT_ONCE = 32  # images whose probabilities at every place are held at a time


class MaskedPrior(CodeTransformer):
    """Predict masked codes of an image from all codes that are not masked."""

    exact = False

    def __init__(
        self,
        grids: Grids,
        width: int,
        depth: int,
        dropout: float,
        classes: int = 0,
        label_dropout: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(grids, width, depth, dropout, classes)
        self.label_dropout, self.label_smoothing = label_dropout, label_smoothing

    def logits(self, codes: Tensor, masked: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """Return the logits [B, places, K] of each map, given codes [B, T] and which of them are masked
        [B, T]."""
        tokens = torch.where(masked, self.mask_token, codes + self.offsets)
        x = self.tokens(tokens) + self.positions() + self.label_vectors(label, len(codes))[:, None]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, causal=False)
        return [self.logits_at(x[:, self.places_of(k)], k) for k in range(len(self.grids))]

    def draws(self, n: int, generator: torch.Generator) -> Tensor:  # [n, 2 + T]
        """Draw what `loss` needs: which labels are dropped, how many codes are masked, and in which order."""
        return torch.rand(n, 2 + self.length, generator=generator)

    def loss(self, codes: Tensor, label: Tensor, draws: Tensor) -> Tensor:  # []
        """Return the smoothed cross-entropy per masked code of a batch, codes [B, T] and labels [B]."""
        known = kept_labels(label, draws, self.label_dropout) if self.classes else None
        count = masked_at(draws[:, 1], self.length)
        masked = draws[:, 2:].argsort(1).argsort(1) < count[:, None]
        total = draws.new_zeros(())
        for number, logits in enumerate(self.logits(codes, masked, known)):
            here = self.places_of(number)
            each = F.cross_entropy(
                logits.flatten(0, 1),
                codes[:, here].flatten(),
                reduction="none",
                label_smoothing=self.label_smoothing if self.training else 0.0,
            )
            total = total + (each * masked[:, here].flatten()).sum()
        return total / count.sum()


def masked_at(progress: Tensor, length: int) -> Tensor:
    """Return how many of `length` codes are masked at `progress` in [0, 1) by the cosine schedule; at least
    1."""
    return torch.ceil(torch.cos(progress * math.pi / 2) * length).clamp(min=1, max=length).long()


@lru_cache
def halton_order(height: int, width: int) -> tuple[int, ...]:
    """Return the places of a map in the order of a Halton sequence of bases 2 and 3 (Besnier et al. 2025).

    Places that are filled in together then lie far apart, and depend little on each other.
    """

    def radical_inverse(number: int, base: int) -> float:
        value, part = 0.0, 1.0 / base
        while number:
            number, digit = divmod(number, base)
            value, part = value + digit * part, part / base
        return value

    order: dict[int, None] = {}  # keeps the order of insertion
    number = 1
    while len(order) < height * width:
        row, column = int(radical_inverse(number, 2) * height), int(radical_inverse(number, 3) * width)
        order.setdefault(row * width + column)
        number += 1
    return tuple(order)


def masked_after(passes: int, length: int) -> list[int]:
    """Return how many of `length` codes are masked after each pass by the cosine schedule; 0 after the last.

    Each pass fills in at least one code, so there are at most `length` passes.
    """
    count = min(passes, length)
    left = masked_at(torch.arange(1, count + 1) / count, length).tolist()
    left[-1] = 0
    before = [length, *left]
    for k in range(1, len(before)):
        before[k] = max(0, min(before[k], before[k - 1] - 1))
    return before[1:]


@torch.no_grad()
def draw_masked(
    prior: MaskedPrior,
    n: int,
    generator: torch.Generator,
    label: Tensor | None,
    choice: Choice,
    passes: int = PASSES,
) -> Tensor:  # [n, T] int64
    """Draw n code sequences, one map after the other, each filled in within `passes` passes in the choice's
    order."""
    device = prior.head.weight.device
    labels = label_rows(label, n, choice, device)
    codes = torch.zeros(n, prior.length, dtype=torch.int64, device=device)
    masked = torch.ones(n, prior.length, dtype=torch.bool, device=device)
    twice = len(labels) // n
    for number, grid in enumerate(prior.grids):
        here = prior.places_of(number)
        left = masked_after(passes, grid.places)
        for k, behind in enumerate(left, 1):
            logits = prior.logits(codes.repeat(twice, 1), masked.repeat(twice, 1), labels)[number]
            part = codes[:, here], masked[:, here], logits, choice
            if choice.order == "confidence":
                fill_by_confidence(*part, behind, choice.order_noise * (1 - k / len(left)), generator)
            else:
                done = grid.places - ([grid.places, *left])[k - 1]
                order = torch.tensor(halton_order(grid.height, grid.width)[done : grid.places - behind])
                fill_places(*part, order.to(device), generator)
    return codes


def fill_places(
    codes: Tensor,  # [n, T] of one map, filled in in place
    masked: Tensor,  # [n, T] bool, likewise
    logits: Tensor,  # [n, T, K], or with guidance [2n, T, K]
    choice: Choice,
    places: Tensor,  # [P] int64
    generator: torch.Generator,
) -> None:
    """Draw codes at the given places."""
    p = probabilities(guided(logits[:, places], choice.guidance), choice)
    uniform = torch.rand(len(codes), len(places), generator=generator).to(p.device)
    codes[:, places], masked[:, places] = pick(p, uniform), False


def fill_by_confidence(
    codes: Tensor,  # [n, T] of one map, filled in in place
    masked: Tensor,  # [n, T] bool, likewise
    logits: Tensor,  # [n, T, K], or with guidance [2n, T, K]
    choice: Choice,
    behind: int,
    noise: float,
    generator: torch.Generator,
) -> None:
    """Draw a code for every masked place and keep the most confident ones, so that `behind` stay masked.

    The confidence is the log probability with which the code was drawn, plus `noise` times a Gumbel number
    (Chang et al. 2022).
    """
    uniform = torch.rand(2, *codes.shape, generator=generator, dtype=torch.float64).to(codes.device)
    drawn, confidence = torch.empty_like(codes), torch.empty_like(uniform[0])
    scores = guided(logits, choice.guidance)
    for rows in torch.arange(len(codes)).split(AT_ONCE):
        p = probabilities(scores[rows], choice)
        drawn[rows] = pick(p, uniform[0, rows])
        of_code = p.gather(-1, drawn[rows][..., None])[..., 0] / p.sum(-1)
        confidence[rows] = of_code.log() - noise * torch.log(-torch.log(uniform[1, rows].clamp_min(1e-300)))
    confidence[~masked] = -torch.inf
    rank = confidence.argsort(1, descending=True).argsort(1)
    new = rank < int(masked[0].sum()) - behind
    codes[new], masked[new] = drawn[new], False


def draw_n(
    prior: MaskedPrior, n: int, generator: torch.Generator, label: Tensor | None, choice: Choice
) -> Tensor:  # [n, T] int64
    """Draw n code sequences with random numbers from the generator."""
    return draw_masked(prior, n, generator, label, choice)


def build(config: PriorConfig, grids: Grids, classes: int) -> MaskedPrior:
    """Build the prior that the configuration describes; `classes` is the number of labels, 0 for no labels."""
    sizes = (config.option("width"), config.option("depth"), config.option("dropout"))
    left_out = (config.option("label_dropout"), config.option("label_smoothing"))
    return MaskedPrior(grids, *sizes, classes, *left_out)
