"""Define a transformer over the codes of an image, and the likelihood of a decoder-only one.

Layers are those of recent language models: RMSNorm before each part (Zhang and Sennrich 2019), normalised
queries and keys, SwiGLU (Shazeer 2020), no biases. A place's position is a learned row, a learned column and
its map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast.priors.codes import Grid, Grids, places
from movae_fast.priors.config import PriorConfig

HEAD = 64  # width of an attention head


class Attention(nn.Module):
    """Attend among all positions of a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.RMSNorm(HEAD)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, heads, T, 64] each
        """Return queries, keys and values of x [B, T, width]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        # In float32: autocast's bfloat16 is not the dtype of the norms' weights.
        return self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype), v

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = self.project(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Add attention and then a SwiGLU block to the sequence, each on its RMS-normalised input.

    `cached_steps` computes the same for one place at a time.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // HEAD) * HEAD
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.dropout(self.attention(self.before_attention(x), causal))
        return x + self.dropout(self.mlp(self.before_mlp(x)))


class CodeTransformer(nn.Module):
    """Map a sequence of tokens to the logits of the code at each position.

    The codes of all maps have different tokens, in the order of the maps; one more token stands for a masked
    code. The sequence begins with the vector of the label; the last such vector means "no label".
    """

    def __init__(self, grids: Grids, width: int, depth: int, dropout: float, classes: int) -> None:
        super().__init__()
        self.grids, self.width, self.classes = grids, width, classes
        self.length, self.mask_token = places(grids), sum(grid.codes for grid in grids)
        self.tokens = nn.Embedding(self.mask_token + 1, width)
        self.labels = nn.Embedding(classes + 1, width)
        self.rows = nn.ParameterList(nn.Parameter(0.02 * torch.randn(g.height, 1, width)) for g in grids)
        self.columns = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, g.width, width)) for g in grids)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, self.mask_token, bias=False)
        self.dropout = nn.Dropout(dropout)
        starts = [sum(grid.codes for grid in grids[:k]) for k in range(len(grids))]
        self.starts = starts
        each = [torch.full((grid.places,), start) for grid, start in zip(grids, starts, strict=True)]
        self.register_buffer("offsets", torch.cat(each), persistent=False)
        self.offsets: Tensor  # [T] what is added to a place's code to make it a token
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)

    def positions(self) -> Tensor:  # [T, width]
        """Return the position embedding of each place of the sequence."""
        maps = zip(self.rows, self.columns, strict=True)
        return torch.cat([(rows + columns).flatten(0, 1) for rows, columns in maps])

    def label_vectors(self, label: Tensor | None, n: int) -> Tensor:  # [n, width]
        """Return the embeddings of labels [n]; None and -1 mean "no label"."""
        if label is None:
            return self.labels.weight[self.classes].expand(n, -1)
        return self.labels(torch.where(label < 0, self.classes, label))

    def places_of(self, number: int) -> slice:
        """Return the slice of the sequence that holds map `number`."""
        first = places(self.grids[:number])
        return slice(first, first + self.grids[number].places)

    def logits_at(self, hidden: Tensor, number: int) -> Tensor:  # [..., K] float32
        """Return the logits of codes of map `number` from hidden [..., width]."""
        return F.linear(self.norm(hidden), self.head_of(number)).float()

    def head_of(self, number: int) -> Tensor:  # [K, width]
        """Return the part of the output layer's weight that gives the logits of map `number`."""
        start = self.starts[number]
        return self.head.weight[start : start + self.grids[number].codes]


class CausalPrior(CodeTransformer):
    """Model the codes of an image autoregressively, with exact likelihood."""

    exact = True

    def __init__(
        self, grids: Grids, width: int, depth: int, dropout: float, classes: int = 0, label_dropout: float = 0.1
    ) -> None:
        super().__init__(grids, width, depth, dropout, classes)
        self.label_dropout = label_dropout

    def inputs(self, codes: Tensor, label: Tensor | None) -> Tensor:  # [B, T, width]
        """Return the layers' input at each position: the token before it plus the position's embedding."""
        before = self.tokens(codes[:, :-1] + self.offsets[:-1])
        first = self.label_vectors(label, len(codes))[:, None].to(before)
        return torch.cat([first, before], 1) + self.positions()

    def hidden(self, codes: Tensor, label: Tensor | None) -> Tensor:  # [B, T, width]
        """Return the layers' output at each position, which depends only on earlier codes."""
        x = self.dropout(self.inputs(codes, label))
        for layer in self.layers:
            x = layer(x, causal=True)
        return x

    def logits(self, codes: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """Return for each map the logits [B, places, K] of its codes, of codes [B, T]."""
        x = self.hidden(codes, label)
        return [self.logits_at(x[:, self.places_of(k)], k) for k in range(len(self.grids))]

    def nats(self, codes: Tensor, label: Tensor | None = None) -> Tensor:  # [B]
        """Return -log p of the codes [B, T] of each image, in nats."""
        return nats_under(self.logits(codes, label), codes, self.grids)

    def draws(self, n: int, generator: torch.Generator) -> Tensor:  # [n, 1]
        """Draw the random numbers by which `loss` decides which labels to drop."""
        return torch.rand(n, 1, generator=generator)

    def loss(self, codes: Tensor, label: Tensor, draws: Tensor) -> Tensor:  # []
        """Return the nats per code of a batch, codes [B, T] and labels [B]."""
        known = kept_labels(label, draws, self.label_dropout) if self.classes else None
        return self.nats(codes, known).mean() / self.length


def kept_labels(label: Tensor, draws: Tensor, dropout: float) -> Tensor:
    """Return labels [B] with a fraction `dropout` of them replaced by -1: those whose number in draws [B, 1] is
    below it."""
    return torch.where(draws[:, 0] < dropout, -1, label)


def nats_under(logits: Sequence[Tensor], codes: Tensor, grids: Sequence[Grid]) -> Tensor:  # [B]
    """Return -log p of codes [B, T] under the logits [B, places, K] of each map."""
    total, at = codes.new_zeros(len(codes), dtype=torch.float32), 0
    for each, grid in zip(logits, grids, strict=True):
        target = codes[:, at : at + grid.places]
        nats = F.cross_entropy(each.flatten(0, 1), target.flatten(), reduction="none")
        total = total + nats.view(target.shape).sum(1)
        at += grid.places
    return total


def build_causal(config: PriorConfig, grids: Grids, classes: int) -> CausalPrior:
    """Build the prior that the configuration describes; `classes` is the number of labels, 0 for no labels."""
    sizes = (config.option("width"), config.option("depth"), config.option("dropout"))
    return CausalPrior(grids, *sizes, classes, config.option("label_dropout"))
