"""Average a model's parameters exponentially over the steps; the average is evaluated, sampled and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from movae_fast.training.flat import FlatParameters


class WeightAverage:
    """Average parameters that lie in one flat tensor, by one operation per step, beginning with their
    values."""

    def __init__(self, flat: FlatParameters, decay: float) -> None:
        self.flat, self.decay = flat, decay
        self.values = flat.data.clone()  # [P]

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Move towards the parameters, by 1 - decay of the way; not where `left_out` [] is 1."""
        weight: float | Tensor = 1 - self.decay
        if left_out is not None:
            weight = (1 - left_out.to(self.values)) * weight
        self.values.lerp_(self.flat.data, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters their averages, and their own values back afterwards."""
        own = self.flat.data.clone()
        with torch.no_grad():
            self.flat.data.copy_(self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                self.flat.data.copy_(own)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averages by the names of the model's parameters, whatever the flat tensor's layout."""
        return {name: view.clone() for name, view in self._views(model)}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Take the averages from a `state_dict`."""
        for name, view in self._views(model):
            view.copy_(state[name])

    def _views(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        named = model.named_parameters(remove_duplicate=False)  # a tied weight has a value under each name
        return [(name, self.flat.view(self.values, p)) for name, p in named if id(p) in self.flat.starts]
