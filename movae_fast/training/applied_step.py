"""What an optimizer's step did to the parameters: its cosine with each objective's gradient, and its
projection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from movae_fast import ops
from movae_fast.projected_step import Columns, StepMetric, correction, metric_roots, step_cosines
from movae_fast.training.step import GradientStep, Kind


@dataclass
class Watched:
    """What was seen of one applied step."""

    cosines: Tensor  # [m] over all objectives; NaN where not computed


class AppliedStep:
    """Looks at the shared parameters before and after an optimizer's step, where the rows are at hand.

    With a `metric` every step is projected (see `projected_step`), in plain length or in the optimizer's
    metric. On steps that are logged the cosine of the applied change with each row is measured, projected or
    not. Over several processes each takes its share of the columns, and all find the same multipliers.
    """

    def __init__(
        self, gradient: GradientStep, optimizer: torch.optim.Optimizer, metric: StepMetric | None
    ) -> None:
        self.gradient, self.optimizer, self.metric = gradient, optimizer, metric
        flat, world = gradient.flat, gradient.world
        self.columns = Columns(world.shard, world.sum_, world.gather_)
        if metric == "optimizer":
            self.roots = torch.ones_like(flat.shared_data)
            self.root_views = [flat.view(self.roots, p) for p in flat.shared]

    @contextmanager
    def watched(self, kind: Kind) -> Iterator[Watched]:
        """Run the optimizer's step inside; project it and measure it afterwards, as the kind of step asks."""
        seen = Watched(self.gradient.unknown)
        project = self.metric is not None
        if not kind.rows or not self.gradient.reached or not (project or kind.diagnose):
            yield seen
            return
        buffer, parameters = self.gradient.buffer, self.gradient.flat.shared_data
        before = parameters.clone()
        yield seen
        if project:
            with record_function("step projection"):
                torch.sub(before, parameters, out=buffer[-1])
                self.project(buffer, keep=kind.diagnose)
        if kind.diagnose:
            torch.sub(before, parameters, out=buffer[-1])
            seen.cosines = self.gradient.scatter(self.gradient.spread(step_cosines(self.gramian(buffer))))

    def gramian(self, rows: Tensor) -> Tensor:
        """Return the Gramian of rows [n, P], each process contributing its share of the columns."""
        return self.columns.total(ops.gramian(self.columns.share(rows)))

    @torch.no_grad()
    def project(self, buffer: Tensor, keep: bool) -> None:
        """Correct the parameters by the step projection of buffer [m + 1, P], the rows and the step.

        The rows are spoilt unless they are to be kept, for the log: the next step writes them anew.
        """
        roots = None
        if self.metric == "optimizer":
            roots, buffer = self.roots, buffer.clone() if keep else buffer
            metric_roots(self.optimizer, self.gradient.flat.shared, self.root_views)
        change, _ = correction(buffer, roots, self.gradient.precision.loss_scale(), self.columns)
        self.gradient.flat.shared_data.add_(change)
