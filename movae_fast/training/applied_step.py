"""Project the optimizer's step on the shared parameters, for `--conflict_free step`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from movae_fast.choices import StepMetric
from movae_fast.projected_step import Columns, correction, metric_roots
from movae_fast.training.flat import FlatParameters, Rows


class StepProjection:
    """Project the steps of an optimizer (see `projected_step`), in the identity metric or in the optimizer's
    own.

    Each process works on its `columns` of the rows, and all compute the same multipliers.
    """

    def __init__(
        self, metric: StepMetric, optimizer: torch.optim.Optimizer, flat: FlatParameters, columns: Columns
    ) -> None:
        self.metric, self.optimizer, self.flat, self.columns = metric, optimizer, flat, columns
        if metric == "optimizer":
            self.roots = torch.ones_like(flat.shared_data)
            self.root_views = [flat.view(self.roots, p) for p in flat.shared]

    @torch.no_grad()
    def correct(self, rows: Rows, before: Tensor, loss_scale: Tensor | None, keep_rows: bool) -> None:
        """Move the shared parameters from the end of the optimizer's step to the end of the projected step.

        before: the shared parameters [P] before the optimizer's step. loss_scale: the factor by which fp16
        training has scaled the rows. keep_rows: leave `rows` intact; otherwise they may be overwritten.
        """
        with record_function("step projection"):
            torch.sub(before, self.flat.shared_data, out=rows.step)
            roots, both = None, rows.with_step
            if self.metric == "optimizer":
                roots, both = self.roots, both.clone() if keep_rows else both
                metric_roots(self.optimizer, self.flat.shared, self.root_views)
            change, _ = correction(both, roots, loss_scale, self.columns)
            self.flat.shared_data.add_(change)
