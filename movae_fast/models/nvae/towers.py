"""Define the encoder, which leads to the smallest resolution, and the decoder, which starts there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from movae_fast.models.nvae.cells import decoder_cell, encoder_cell
from movae_fast.models.nvae.convs import NormedConv2d
from movae_fast.models.nvae.group import Group
from movae_fast.models.nvae.layout import Layout

TOWER_EXPAND, OUTER_EXPAND = 6, 3  # width inside a decoder cell / its own: between groups, behind the last


class Encoder(nn.Module):
    """Map images to one activation per group, in the decoder's order: from the smallest resolution to the
    largest.

    The first activation has passed one layer more than the others.
    """

    def __init__(self, layout: Layout, image_channels: int) -> None:
        super().__init__()
        width = layout.channels
        self.stem = NormedConv2d(image_channels, width, 3)
        outer: list[nn.Module] = []
        for _ in range(layout.outer_blocks):
            outer += [encoder_cell(width, width) for _ in range(layout.outer_cells - 1)]
            outer.append(encoder_cell(width, 2 * width, down=True))
            width *= 2
        self.outer = nn.Sequential(*outer)
        self.scales = (
            nn.ModuleList()
        )  # per scale, the largest resolution first: the cells before each of its groups
        self.downs = nn.ModuleList()  # between the scales
        for scale, count in enumerate(reversed(layout.groups)):
            if scale > 0:
                self.downs.append(encoder_cell(width, 2 * width, down=True))
                width *= 2
            cells = range(layout.cells_per_group)
            self.scales.append(
                nn.ModuleList(nn.Sequential(*(encoder_cell(width, width) for _ in cells)) for _ in range(count))
            )
        self.top = nn.Sequential(nn.ELU(), NormedConv2d(width, width, 1), nn.ELU())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # [B, C, S, S] -> G maps [B, width, h, w]
        h = self.outer(self.stem(x))
        kept = []
        for scale, groups in enumerate(self.scales):
            if scale > 0:
                h = self.downs[scale - 1](h)
            for cells in groups.children():
                h = cells(h)
                kept.append(h)
        return self.top(kept.pop()), *reversed(kept)


class Decoder(nn.Module):
    """Hold the groups of latents and the cells between and after them, which lead to the input of the image's
    layer.

    The first state is a learned constant; the image influences the states only through the latents.
    """

    def __init__(self, layout: Layout, image_side: int) -> None:
        super().__init__()
        width, side = layout.width(0), layout.side(image_side, 0)
        self.constant = nn.Parameter(torch.rand(width, side, side))
        self.groups = nn.ModuleList()  # of all scales, the smallest resolution first
        self.ups = nn.ModuleList()  # between the scales
        for scale, count in enumerate(layout.groups):
            if scale > 0:
                self.ups.append(decoder_cell(width, width // 2, TOWER_EXPAND, up=True))
                width //= 2
            for _ in range(count):
                self.groups.append(Group(layout, width, first=len(self.groups) == 0))
        outer: list[nn.Module] = []
        for _ in range(layout.outer_blocks):
            outer.append(decoder_cell(width, width // 2, OUTER_EXPAND, up=True))
            width //= 2
            outer += [decoder_cell(width, width, OUTER_EXPAND) for _ in range(layout.outer_cells - 1)]
        self.outer = nn.Sequential(*outer)
        # The group before which the side doubles -> the cell that doubles it.
        starts = list(itertools.accumulate(layout.groups))[:-1]
        self.up_before = {group: k for k, group in enumerate(starts)}

    def each(self) -> Iterator[Group]:
        """Yield the groups in order, the smallest resolution first."""
        for group in self.groups:
            assert isinstance(group, Group)
            yield group

    def start(self, batch: int) -> Tensor:  # [B, width, h, w]
        """Return the decoder's first state, a learned constant, expanded to a batch."""
        return self.constant.expand(batch, -1, -1, -1)

    def state_before(self, group: int, state: Tensor) -> Tensor:
        """Return the state at the resolution of a group, doubling its side if the group starts a new scale."""
        up = self.up_before.get(group)
        return state if up is None else self.ups[up](state)
