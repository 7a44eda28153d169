"""Project the step that an optimizer applied to the shared parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from movae_fast.projected_step import Columns, StepMetric, correction, metric_roots
from movae_fast.training.flat import FlatParameters, Rows


class StepProjection:
    """Project the steps of an optimizer (see `projected_step`), in plain length or in the optimizer's
    metric.

    Over several processes each takes its `columns` of the rows, and all find the same multipliers.
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
        """Correct the parameters, which were `before` [P] until the optimizer's step.

        The rows are spoilt unless they are to be kept, for the log: the next step writes them anew.
        """
        with record_function("step projection"):
            torch.sub(before, self.flat.shared_data, out=rows.step)
            roots, both = None, rows.with_step
            if self.metric == "optimizer":
                roots, both = self.roots, both.clone() if keep_rows else both
                metric_roots(self.optimizer, self.flat.shared, self.root_views)
            change, _ = correction(both, roots, loss_scale, self.columns)
            self.flat.shared_data.add_(change)
