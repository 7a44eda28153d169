"""Describe a model's codes as one sequence of tokens, and go from images to it and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from movae_fast.models import VAE, CodebookVAE
from movae_fast.names import ArgumentError


class Grid(NamedTuple):
    """Hold the size of one map of codes, and from how many codes each is chosen."""

    height: int
    width: int
    codes: int

    @property
    def places(self) -> int:
        """Return the number of codes of the map."""
        return self.height * self.width


Grids = tuple[Grid, ...]  # the maps of one image, in the order of the sequence


def places(grids: Sequence[Grid]) -> int:
    """Return the length of the sequence: the codes of one image."""
    return sum(grid.places for grid in grids)


def grids_of(model: VAE) -> Grids:
    """Return the maps of codes that a model makes of one image. Raises ArgumentError for one without codes."""
    if not isinstance(model, CodebookVAE):
        raise ArgumentError("kind: the model has no codes; give a kind for its latents")
    return tuple(Grid(side, side, codes) for side, codes in model.code_maps)


@torch.no_grad()
def codes_of(model: VAE, x: Tensor) -> Tensor:  # [B, T] int64
    """Return the codes of images x [B, C, S, S], each map row by row, one map after the other."""
    assert isinstance(model, CodebookVAE)
    (z,) = model.encode(x)
    return model.to_sequence(model.quantize(z).codes)


@torch.no_grad()
def images_of(model: VAE, codes: Tensor) -> Tensor:  # [B, C, S, S] in the model's range
    """Return the images of codes [B, T]."""
    assert isinstance(model, CodebookVAE)
    return model.to_image(model.decode(model.lookup(model.from_sequence(codes))))


def unigram_bits(codes: Tensor, grids: Sequence[Grid], fitted_on: Tensor) -> float:
    """Return bits per code [N, T] under each map's own usage, with one added to every count, of `fitted_on`.

    It is what codes cost that are drawn independently of each other, and of where they are.
    """
    nats, at = 0.0, 0
    for grid in grids:
        here = slice(at, at + grid.places)
        counts = torch.bincount(fitted_on[:, here].reshape(-1).long(), minlength=grid.codes).double() + 1
        nats -= float((counts / counts.sum()).log()[codes[:, here].long()].sum())
        at += grid.places
    return nats / codes.numel() / math.log(2)
