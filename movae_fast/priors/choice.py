"""Draw codes from logits, with temperature, truncation to the most probable codes, and guidance by a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.choices import Order


@dataclass(frozen=True)
class Choice:
    """Hold how a code is drawn from its logits.

    temperature: what the logits are divided by. top_k: keep only this many most probable codes; 0 keeps all.
    top_p: keep only the most probable codes whose probabilities add up to this. guidance: the scale of
    classifier-free guidance (Ho and Salimans 2022); 1 uses the logits given the label unchanged.
    order: of maskgit, whether a pass fills in the next places of a Halton sequence, or those of whose codes the
    network is most confident. order_noise: the scale of the Gumbel noise on that confidence at the first pass.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    order: Order = "halton"
    order_noise: float = 4.5


PLAIN = Choice()
BELOW_ONE = 1 - 2**-52  # times any float64 it is a smaller number


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Return guided logits [n, K] from the logits of 2n rows, of which the first n have labels and the others
    none.

    If guidance is 1, there are only rows with labels, and they are returned unchanged.
    """
    if guidance == 1:
        return logits
    with_label, without = logits.chunk(2)
    return without + guidance * (with_label - without)


def probabilities(logits: Tensor, choice: Choice) -> Tensor:  # [n, K] float64
    """Return the probabilities with which codes are drawn, after temperature and truncation."""
    logits = logits.double()
    p = torch.softmax(logits if choice.temperature == 1 else logits / choice.temperature, -1)
    if choice.top_k and choice.top_k < p.shape[-1]:
        least = p.topk(choice.top_k, -1).values[..., -1:]
        p = torch.where(p < least, 0.0, p)
    if choice.top_p < 1:
        sorted_p, order = p.sort(-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # of more probable codes
        p = torch.zeros_like(p).scatter_(-1, order, torch.where(before < choice.top_p, sorted_p, 0.0))
    return p


def pick(p: Tensor, uniform: Tensor) -> Tensor:  # [n] int64
    """Return the codes that uniform numbers [n] in [0, 1) select from distributions p [n, K], which need not be
    normalised."""
    cumulative = p.cumsum(-1)
    # The product with the sum lies below the sum after rounding, too: where the last code with p > 0 ends.
    at = uniform.double().clamp(max=BELOW_ONE)[..., None] * cumulative[..., -1:]
    return (cumulative <= at).sum(-1)


def label_rows(label: Tensor | None, n: int, choice: Choice, device: torch.device) -> Tensor:
    """Return labels [n], or with guidance [2n], where the second half is -1 for "without a label"."""
    label = torch.full((n,), -1, device=device) if label is None else label.to(device)
    return label if choice.guidance == 1 else torch.cat([label, torch.full_like(label, -1)])
