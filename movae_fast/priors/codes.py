"""Convert images to sequences of a model's codes and back, for priors that model such sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from movae_fast.models import VAE, CodebookVAE
from movae_fast.names import ArgumentError


class Grid(NamedTuple):
    """Hold the size of one map of codes, and the number of codes K that each position chooses from."""

    height: int
    width: int
    codes: int

    @property
    def places(self) -> int:
        """Return the number of positions of the map."""
        return self.height * self.width


ROWS = 1 << 16  # rows of a memory-mapped file that are read at a time
Grids = tuple[Grid, ...]  # the maps of one image, in the order of the sequence


def places(grids: Sequence[Grid]) -> int:
    """Return the length of an image's sequence: the number of codes in all its maps."""
    return sum(grid.places for grid in grids)


def grids_of(model: VAE) -> Grids:
    """Return the maps of codes that the model encodes an image to. Raises ArgumentError for a model without
    codes."""
    if not isinstance(model, CodebookVAE):
        raise ArgumentError("kind: the model has no codes; give a kind for its latents")
    return tuple(Grid(side, side, codes) for side, codes in model.code_maps)


@torch.no_grad()
def codes_of(model: VAE, x: Tensor) -> Tensor:  # [B, T] int64
    """Return the code sequences of images x [B, C, S, S]: map after map, each map row by row."""
    assert isinstance(model, CodebookVAE)
    (z,) = model.encode(x)
    return model.to_sequence(model.quantize(z).codes)


@torch.no_grad()
def images_of(model: VAE, codes: Tensor) -> Tensor:  # [B, C, S, S] in the model's range
    """Return the images that the model decodes from code sequences [B, T]."""
    assert isinstance(model, CodebookVAE)
    return model.to_image(model.decode(model.lookup(model.from_sequence(codes))))


def usage_bits(codes: np.ndarray, grids: Sequence[Grid], fitted_on: np.ndarray) -> float:
    """Return the mean cost in bits per code of sequences [N, T] if each map's codes have the frequencies of
    `fitted_on` [M, T], with 1 added to every count.

    This ignores the order of codes and their positions, and is a baseline for priors.
    """
    nats, at = 0.0, 0
    for grid in grids:
        here = slice(at, at + grid.places)
        usage, counts = (usage_counts(rows[:, here], grid.codes) for rows in (fitted_on, codes))
        nats -= float(counts @ np.log((usage + 1) / (usage + 1).sum()))
        at += grid.places
    return nats / codes.size / math.log(2)


def usage_counts(codes: np.ndarray, size: int) -> np.ndarray:  # [size] float64
    """Return how often each of `size` codes occurs in memory-mapped codes [N, t], which are read in parts of
    ROWS rows."""
    counts = np.zeros(size)
    for first in range(0, len(codes), ROWS):
        counts += np.bincount(codes[first : first + ROWS].reshape(-1), minlength=size)
    return counts
