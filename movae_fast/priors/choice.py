"""Say how codes are drawn from logits: temperature, the most probable ones, guidance by a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Say how a code is drawn from its logits.

    temperature: what logits are divided by. top_k: the most probable codes that are kept, 0 for all. top_p: the
    fewest codes that have this probability are kept. guidance: how far the logits go from those without a label
    to those with one and beyond (Ho and Salimans 2022): 1 is the label's own.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


PLAIN = Choice()


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Return the logits [n, K] of 2n rows: with labels first, without them behind; as they are if guidance is
    1."""
    if guidance == 1:
        return logits
    with_label, without = logits.chunk(2)
    return without + guidance * (with_label - without)


def probabilities(logits: Tensor, choice: Choice) -> Tensor:  # [n, K] float64
    """Return the probabilities that codes are drawn with."""
    p = torch.softmax(logits.double() / choice.temperature, -1)
    if choice.top_k and choice.top_k < p.shape[-1]:
        least = p.topk(choice.top_k, -1).values[..., -1:]
        p = torch.where(p < least, 0.0, p)
    if choice.top_p < 1:
        sorted_p, order = p.sort(-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p  # of more probable codes
        p = torch.zeros_like(p).scatter_(-1, order, torch.where(before < choice.top_p, sorted_p, 0.0))
    return p


def pick(p: Tensor, uniform: Tensor) -> Tensor:  # [n] int64
    """Return the codes at uniform numbers [n] in [0, 1) of the distributions p [n, K], which need not sum to
    one."""
    cumulative = p.cumsum(-1)
    at = uniform.double()[..., None] * cumulative[..., -1:]
    # A number below the sum lies below it after rounding, too, where the last code with p > 0 ends.
    last = (p > 0).double().mul(torch.arange(1, p.shape[-1] + 1, device=p.device)).argmax(-1)
    return torch.minimum((cumulative <= at).sum(-1), last)


def label_rows(label: Tensor | None, n: int, choice: Choice, device: torch.device) -> Tensor:
    """Return the labels [n], or [2n] where guidance needs the rows without a label as well; -1 is none."""
    label = torch.full((n,), -1, device=device) if label is None else label.to(device)
    return label if choice.guidance == 1 else torch.cat([label, torch.full_like(label, -1)])
