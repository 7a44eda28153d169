"""Keep an exponential moving average of a model's parameters, which is evaluated, sampled and exported in their
place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from movae_fast.training.flat import FlatParameters


class WeightAverage:
    """Keep the exponential moving average of all parameters, as one flat tensor updated by one operation per
    step.

    It starts from the parameters' initial values.
    """

    def __init__(self, flat: FlatParameters, decay: float) -> None:
        self.flat, self.decay = flat, decay
        self.values = flat.data.clone()  # [P]

    @torch.no_grad()
    def update(self, left_out: Tensor | None = None) -> None:
        """Move the average towards the parameters, by 1 - decay of the distance.

        left_out: [] 1 if the optimizer's step was skipped; the average then stays.
        """
        weight: float | Tensor = 1 - self.decay
        if left_out is not None:
            weight = (1 - left_out.to(self.values)) * weight
        self.values.lerp_(self.flat.data, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the parameters by their averages during the block, and restore them afterwards."""
        own = self.flat.data.clone()
        with torch.no_grad():
            self.flat.data.copy_(self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                self.flat.data.copy_(own)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averages by the names of the model's parameters, independent of the flat tensor's
        layout."""
        return {name: view.clone() for name, view in self._views(model)}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load the averages from the result of `state_dict`."""
        for name, view in self._views(model):
            view.copy_(state[name])

    def _views(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        named = model.named_parameters(remove_duplicate=False)  # a tied weight has a value under each name
        return [(name, self.flat.view(self.values, p)) for name, p in named if id(p) in self.flat.starts]
