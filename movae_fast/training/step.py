"""One training step's gradient: the vector of losses becomes `.grad` on every parameter.

A step reads: forward, rows, (exchange,) Gramian, projection, combine. `rows`, `weighted` and `summed` are the
three ways to differentiate a batch; each is one function of tensors and can be compiled as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from movae_fast import ops
from movae_fast.aggregation.fused import FusedAggregator
from movae_fast.aggregation.registry import aggregate, is_weighting
from movae_fast.jacobian import (
    Gradients,
    all_rows,
    at_features,
    cheap_rows,
    cosines_with_update,
    reaching,
    shared_rows,
    weighted_row,
)
from movae_fast.models import VAE, VQOutput
from movae_fast.objectives import LossVector
from movae_fast.training.compiled import MULTIRATE_LIMITS, Compiled
from movae_fast.training.flat import FlatParameters, write
from movae_fast.training.precision import Precision
from movae_fast.training.world import Pending, World


class StepRecord(NamedTuple):
    """What a step leaves for the log, on the device: [m] each over all objectives, NaN where not computed."""

    losses: Tensor  # unweighted, of this rank's images
    weights: Tensor  # the aggregator's
    cosines: Tensor  # of the aggregated gradient with each objective's, both of the whole batch
    norms: Tensor  # of each objective's gradient
    step_cosines: Tensor  # of the applied change of the parameters with each objective's gradient
    usage: Tensor  # [K] how often each code was chosen; [0] without a codebook


class Forward(NamedTuple):
    """A batch through the network."""

    features: tuple[Tensor, ...]
    weighted: list[Tensor]  # the active objectives, as they are differentiated
    losses: Tensor  # [m] unweighted
    usage: Tensor  # [K] or [0]


class Differentiated(NamedTuple):
    """One batch's losses and gradients."""

    losses: Tensor  # [m] unweighted
    usage: Tensor  # [K] or [0]
    own: Gradients = ()
    shared: Iterable[Gradients] = ()  # rows, or the one gradient
    reached: Sequence[int] = ()  # the rows' objectives


class Kind(NamedTuple):
    """How a step finds its gradient, and what else it computes.

    gradient: "sum", one backward of the weighted sum; "aggregated", from all rows; "weighted", by the weights
        of an earlier step (gramian_every); "weighted cheaply", by those of another place (gramian_at);
        "weighted by part", by those of the batch's first images (gramian_batch).
    """

    gradient: Literal["sum", "aggregated", "weighted", "weighted cheaply", "weighted by part"]
    rows: bool = False  # whether all rows of the whole batch lie in `GradientStep.rows` afterwards
    diagnose: bool = False  # whether the step is one that is logged


# Images, noise, how often each image counts.
Part = tuple[Tensor, Tensor, Tensor | None]
Parts = list[Part]  # to be differentiated one after the other


class GradientStep:
    """Forward, rows, Gramian, aggregation: everything of a step but the optimizer.

    `aggregator` None is the ordinary backward of the weighted sum; then the rows are computed on steps that
    `diagnose` only, for the log, and do not touch the update. `jacobian` "shared" aggregates the gradients of
    the part before the features (what MO-VAE does), "all" those of every parameter.

    Three approximations, off by default: with `gramian_every` k the weights found at a step serve the k - 1
    steps after it too; with `gramian_batch` f the Gramian is that of the first fraction f of the batch; with
    `gramian_at` "features" or "last:K" it is that of the gradients at the features, or at the parameters of the
    last K shared layers before them (`VAE.shared_layers`). Either way the update is then one backward of the
    weighted losses, and on steps that `diagnose` the rows are computed once more, so that the cosines of the
    log are the true ones.

    `accumulate` k splits the batch into k parts that are differentiated one after the other; rows are summed
    before they are aggregated, so the update is that of the whole batch.

    Raises ValueError for a `gramian_at` that the model or the aggregator does not have.
    """

    def __init__(
        self,
        model: VAE,
        losses: LossVector,
        aggregator: nn.Module | None,
        jacobian: str = "shared",
        *,
        precision: Precision | None = None,
        compile_mode: str = "off",
        world: World | None = None,
        accumulate: int = 1,
        gramian_every: int = 1,
        gramian_batch: float = 1.0,
        gramian_at: str = "shared",
    ) -> None:
        self.model, self.losses, self.aggregator = model, losses, aggregator
        self.precision = precision or Precision("fp32", model.device)
        self.world = world or World()
        self.accumulate = accumulate
        self.gramian_every, self.gramian_batch, self.gramian_at = gramian_every, gramian_batch, gramian_at
        self.last = last_parameters(model, gramian_at)
        if gramian_at != "shared" and (aggregator is None or not is_weighting(aggregator)):
            raise ValueError(f"gramian_at {gramian_at}: the aggregator must weight rows by their Gramian alone")
        self.first = 0  # the step that gramian_every counts from: a new stage's losses need new weights
        own = [p for params in model.own_parameters().values() for p in params]
        shared = model.shared_parameters()
        if jacobian == "all":
            shared, own = [*shared, *own], []
        self.cut = jacobian == "shared"
        self.flat = FlatParameters(shared, own, align=self.world.size)
        self.active = torch.tensor(losses.active, device=model.device)
        self.m = len(losses.active)
        # A record's values that a step did not compute: made once, for nobody writes into a record.
        self.unknown = torch.full((len(losses.names),), torch.nan, device=model.device)
        self.reached: list[int] = []  # objectives with a row that is not zero by construction; found at once
        self.reached_index = torch.tensor(self.reached, dtype=torch.int64, device=model.device)
        self.buffer = self.flat.data.new_zeros(1, self.flat.n_shared)  # the rows and, last, a step
        self.views: list[list[Tensor]] = []
        # The last finite weights [m], for the steps that reuse them: part of a checkpoint.
        self.weights = torch.full((self.m,), 1 / self.m, dtype=torch.float64, device=model.device)
        limits = MULTIRATE_LIMITS if getattr(model, "rates", None) is not None else None
        self.by_rows = Compiled(self._by_rows, compile_mode, limits)
        self.by_weights = Compiled(self._by_weights, compile_mode, limits)
        self.by_sum = Compiled(self._by_sum, compile_mode, limits)
        # One graph from the losses to the weighted gradient, where no other process and no host has to be
        # asked.
        one_graph = isinstance(aggregator, FusedAggregator) and self.world.size == 1
        self.by_cheap_gramian = Compiled(self._by_cheap_gramian, compile_mode if one_graph else "off", limits)

    def __call__(
        self,
        x: Tensor,
        step: int,
        noise: Tensor | None = None,
        diagnose: bool = False,
        share: Tensor | None = None,
    ) -> StepRecord:
        """Set every parameter's gradient for this rank's images x [B, C, S, S] of 0-based `step`.

        `noise` [B, …] is the model's (`VAE.draw_noise`); drawn here if it is not given. `share` [B]: how often
        each image counts, see `objectives`.
        """
        noise = self.model.draw_noise(len(x)) if noise is None else noise
        return self.differentiate(self.kind(step, diagnose), x, noise, share, self.scale_at(step))

    @property
    def approximate(self) -> bool:
        """Whether some step's update does without all rows of the whole batch."""
        return self.gramian_every > 1 or self.gramian_batch < 1 or self.gramian_at != "shared"

    @property
    def rows(self) -> Tensor:  # [reached, n_shared]
        return self.buffer[:-1]

    def kind(self, step: int, diagnose: bool = False) -> Kind:
        """Return what is done at 0-based `step`."""
        if self.aggregator is None:
            return Kind("sum", diagnose, diagnose)
        if (step - self.first) % self.gramian_every:
            return Kind("weighted", diagnose, diagnose)
        if self.gramian_at != "shared":
            return Kind("weighted cheaply", diagnose, diagnose)
        if self.gramian_batch < 1:
            return Kind("weighted by part", diagnose, diagnose)
        return Kind("aggregated", True, diagnose)

    def scale_at(self, step: int) -> Tensor:  # [a]
        """Return what the active losses are multiplied by at 0-based `step`."""
        # Sums over parts and ranks are means of the batch when each part's losses are divided beforehand.
        scale = self.losses.weights_at(step)[self.active] / (self.accumulate * self.world.size)
        return self.precision.scale(scale)

    def differentiate(
        self, kind: Kind, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor
    ) -> StepRecord:
        """Set every parameter's gradient: a function of tensors, the same kernels for each batch of a kind."""
        shares = [None] * self.accumulate if share is None else share.chunk(self.accumulate)
        parts = list(zip(x.chunk(self.accumulate), noise.chunk(self.accumulate), shares, strict=True))
        if kind.gradient == "aggregated":
            return self.aggregated(parts, scale)
        if kind.rows:  # once more, for the log alone; what they leave in `.grad` is overwritten below
            with keeping_buffers(self.model):
                self.fill_rows(parts, scale)
        if kind.gradient == "sum":
            found, weights = self.sum(parts, scale), torch.ones(self.m, device=self.active.device)
        else:
            found, weights = self.approximated(kind, parts, scale), self.weights
        if kind.rows:
            cosines, norms = cosines_with_update(self.gramian(), weights, self.rows, None)
            return self.record(found, weights, cosines, norms)
        return self.record(found, None if kind.gradient == "sum" else weights, None, None)

    def compiles(self) -> str:
        """Return the names of what the next call may have to compile first; empty if nothing."""
        if self.aggregator is None:
            regions = [self.by_sum]
        elif self.gramian_at != "shared":
            reuses = self.gramian_every > 1 or self.accumulate > 1
            regions = [self.by_cheap_gramian, self.by_weights] if reuses else [self.by_cheap_gramian]
        else:
            regions = [self.by_rows, self.by_weights] if self.approximate else [self.by_rows]
        return ", ".join(region.name for region in regions if region.pending)

    # The kinds of step.

    def aggregated(self, parts: Parts, scale: Tensor) -> StepRecord:
        """Aggregate all rows of the whole batch."""
        found = self.fill_rows(parts, scale)
        weights, cosines, norms = self.aggregate_rows()
        return self.record(found, weights, cosines, norms)

    def sum(self, parts: Parts, scale: Tensor) -> list[Differentiated]:
        """Differentiate the weighted sum, in one backward."""
        found = [self.write(self.by_sum(*part, scale), k) for k, part in enumerate(parts)]
        self.exchange()
        return found

    def approximated(self, kind: Kind, parts: Parts, scale: Tensor) -> list[Differentiated]:
        """Find weights without all rows, or keep the last ones, and differentiate the losses so weighted at
        once."""
        done: list[Differentiated] = []
        if kind.gradient == "weighted by part":
            done = [self.write(self.weighted_by_part(*parts[0], scale), 0)]
        elif kind.gradient == "weighted cheaply" and len(parts) == 1:
            result, weights = self.by_cheap_gramian(*parts[0], scale)
            self.weights.copy_(weights)
            done = [self.write(result, 0)]
        elif kind.gradient == "weighted cheaply":
            # The weights are the whole batch's, so all parts go forward once before any goes back.
            with keeping_buffers(self.model):
                rows = [self.cheap_rows_of(part, scale) for part in parts]
            self.weights.copy_(self.weigh(self.cheap_gramian(rows)))
        for k, part in enumerate(parts[len(done) :], len(done)):
            done.append(self.write(self.by_weights(*part, scale, self.weights), k))
        self.exchange()
        return done

    def weighted_by_part(self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor) -> Differentiated:
        """Differentiate with weights from the Gramian of the batch's first images.

        The losses are differentiated to the features once, for the whole batch; the shared part then goes
        forward and, a row each, backward with the first images alone. Not compiled: the aggregator decides
        between two backwards of one graph.
        """
        n = max(2, round(len(x) * self.gramian_batch))
        features, weighted, losses, usage = self.forward(x, noise, share, scale)
        found = at_features(weighted, features, self.flat.own)
        with keeping_buffers(self.model), self.precision.autocast():
            self.model.condition(noise[:n])
            few = self.model.encode(x[:n].contiguous(memory_format=torch.channels_last))
        upstream = [[None if g is None else g[:n] for g in row] for row in found.features]
        rows = self.world.sum_(cheap_rows(few, upstream, self.flat.shared))
        self.weights.copy_(self.weigh(ops.gramian(rows)))
        row = weighted_row(features, found.features, self.weights, self.flat.shared)
        return Differentiated(losses, usage, found.own, [row])

    def cheap_rows_of(self, part: Part, scale: Tensor) -> Tensor:  # [m, Q]
        """Return one part's rows at the features, or at the last shared parameters."""
        features, weighted, _, _ = self.forward(*part, scale)
        return cheap_rows(features, at_features(weighted, features, []).features, self.last)

    def cheap_gramian(self, rows: Sequence[Tensor]) -> Tensor:  # [m, m]
        """Return the Gramian of all parts' and ranks' rows: those of parameters add up, those of features stand
        side by side, for each image has features of its own."""
        if self.last:
            return ops.gramian(self.world.sum_(rows[0] if len(rows) == 1 else torch.stack(list(rows)).sum(0)))
        found = [ops.gramian(part) for part in rows]
        return self.world.sum_(found[0] if len(found) == 1 else torch.stack(found).sum(0))

    def weigh(self, gramian: Tensor) -> Tensor:  # [m]
        """Return the aggregator's weights of a Gramian [m, m] of scaled rows, or the last ones if not finite.

        An overflow in fp16 leaves out its own step, not those after it that reuse the weights.
        """
        assert self.aggregator is not None
        weights = self.aggregator.gramian_weighting(self.precision.unscaled(gramian))  # type: ignore[operator]
        return torch.where(weights.isfinite().all(), weights, self.weights)

    # Differentiation: functions of tensors, each one region for the compiler.

    def forward(self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor) -> Forward:
        x = x.contiguous(memory_format=torch.channels_last)
        self.model.condition(noise)
        with self.precision.autocast():
            features = self.model.encode(x)
            out = self.model.forward_features(features, noise)
        losses = self.losses(out, x, share)
        weighted = [losses[i] * scale[k].to(losses[i].dtype) for k, i in enumerate(self.losses.active)]
        usage = out.usage if isinstance(out, VQOutput) else x.new_zeros(0)
        return Forward(features, weighted, torch.stack(losses).detach(), usage)

    def _by_rows(self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor) -> Differentiated:
        features, weighted, losses, usage = self.forward(x, noise, share, scale)
        if self.cut:
            found = at_features(weighted, features, self.flat.own)
            own, reached = found.own, reaching(found.features)
            rows = shared_rows(features, found.features, self.flat.shared)
        else:
            own, reached = [], list(range(self.m))
            rows = all_rows(weighted, self.flat.shared)
        # Eagerly, a row is differentiated when it is asked for: only one at a time lies outside the buffer.
        return Differentiated(losses, usage, own, rows if self.by_rows.mode == "off" else list(rows), reached)

    def _by_cheap_gramian(
        self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor
    ) -> tuple[Differentiated, Tensor]:
        features, weighted, losses, usage = self.forward(x, noise, share, scale)
        found = at_features(weighted, features, self.flat.own)
        # Weighed once: an aggregator may draw or remember.
        weights = self.weigh(self.cheap_gramian([cheap_rows(features, found.features, self.last)]))
        row = weighted_row(features, found.features, weights, self.flat.shared)
        return Differentiated(losses, usage, found.own, [row]), weights

    def _by_weights(
        self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor, weights: Tensor
    ) -> Differentiated:
        features, weighted, losses, usage = self.forward(x, noise, share, scale)
        if self.cut:
            found = at_features(weighted, features, self.flat.own)
            row = weighted_row(features, found.features, weights, self.flat.shared)
            return Differentiated(losses, usage, found.own, [row])
        total = torch.stack([loss * w for loss, w in zip(weighted, weights, strict=True)]).sum()
        return Differentiated(losses, usage, [], [self.gradient(total, self.flat.shared)])

    def _by_sum(self, x: Tensor, noise: Tensor, share: Tensor | None, scale: Tensor) -> Differentiated:
        _, weighted, losses, usage = self.forward(x, noise, share, scale)
        found = self.gradient(torch.stack(weighted).sum(), [*self.flat.shared, *self.flat.own])
        n = len(self.flat.shared)
        return Differentiated(losses, usage, found[n:], [found[:n]])

    @staticmethod
    def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    # From gradients to `.grad`.

    def fill_rows(self, parts: Parts, scale: Tensor) -> list[Differentiated]:
        """Rows of the whole batch into `rows`, and the own parameters' gradients; both summed over ranks."""
        found, pending = [], []
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            with record_function("forward and rows"):
                result = self.by_rows(*part, scale)
            self.flat.write_own(result.own, add=k > 0)
            if last:
                pending = [self.world.start_sum(self.flat.own_grad)]
            pending += self.write_rows(result.shared, result.reached, add=k > 0, last=last)
            found.append(self.kept(result))
        for exchange in pending:
            exchange.wait()
        return found

    def write_rows(
        self, rows: Iterable[Gradients], reached: Sequence[int], add: bool, last: bool
    ) -> list[Pending]:
        """One part's rows into `rows`; the `last` part's set off, each at once, to be summed over ranks."""
        self.reach(reached)
        pending = []
        for j, row in enumerate(rows):
            write(self.views[j], row, add=add)
            if last:
                pending.append(self.world.start_scatter(self.rows[j]))
        return pending

    def reach(self, reached: Sequence[int]) -> None:
        """The buffer of rows, once it is known which objectives have one: at the first step."""
        if list(reached) != self.reached:
            self.reached = list(reached)
            self.reached_index = torch.tensor(self.reached, device=self.active.device)
            self.buffer, views = self.flat.rows(len(self.reached) + 1)
            self.views = views[:-1]

    def gramian(self) -> Tensor:  # [m, m] float64
        """Gramian of all ranks' rows, each rank contributing its stretch of them."""
        with record_function("gramian"):
            gramian = self.world.sum_(ops.gramian(self.world.shard(self.rows)))
            gramian = self.precision.unscaled(gramian)
            if len(self.reached) == self.m:
                return gramian
            full = gramian.new_zeros(self.m, self.m)
            full[self.reached_index[:, None], self.reached_index] = gramian
            return full

    def aggregate_rows(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Combine the rows into the shared parameters' `.grad`: weights [m] or None, cosines and norms [m]."""
        assert self.aggregator is not None
        gramian = self.gramian()
        every = len(self.reached) == self.m
        if is_weighting(self.aggregator):
            with record_function("projection"):
                weights = self.aggregator.gramian_weighting(gramian)  # type: ignore[operator]
            with record_function("combine"):
                used = weights if every else weights[self.reached_index]
                shard, mine = self.world.shard(self.rows), self.world.shard(self.flat.shared_grad)
                ops.combine(shard, used, out=mine)
                self.world.gather_(self.flat.shared_grad)
            self.weights.copy_(torch.where(weights.isfinite().all(), weights, self.weights))
            return weights, *cosines_with_update(gramian, weights, self.rows, None)
        # Aggregators that look at single elements need whole rows on every rank.
        rows = self.rows
        for row in rows if self.world.size > 1 else ():
            self.world.gather_(row)
        if not every:
            rows = rows.new_zeros(self.m, rows.shape[1]).index_copy_(0, self.reached_index, rows)
        with record_function("aggregation"):
            update, weights = aggregate(self.aggregator, rows, gramian)
            self.flat.shared_grad.copy_(update)
        if weights is not None:
            self.weights.copy_(weights)
        return weights, *cosines_with_update(gramian, weights, rows, update)

    def write(self, result: Differentiated, k: int) -> Differentiated:
        """One backward's gradients into `.grad`, added to those of the k parts before."""
        self.flat.write_own(result.own, add=k > 0)
        (row,) = result.shared
        self.flat.write_shared(row, add=k > 0)
        return self.kept(result)

    def kept(self, result: Differentiated) -> Differentiated:
        """What of one part is still wanted when the next has been differentiated.

        A copy: a graph that --compile reduce-overhead replays writes its outputs where they were before.
        """
        if self.accumulate == 1:
            return Differentiated(result.losses, result.usage)
        return Differentiated(result.losses.clone(), result.usage.clone())

    def exchange(self) -> None:
        """Sum `.grad` over the ranks."""
        self.world.sum_(self.flat.grad)

    def record(
        self,
        found: list[Differentiated],
        weights: Tensor | None,
        cosines: Tensor | None,
        norms: Tensor | None,
    ) -> StepRecord:
        losses = found[0].losses if len(found) == 1 else torch.stack([f.losses for f in found]).mean(0)
        usage = found[0].usage if len(found) == 1 else torch.stack([f.usage for f in found]).sum(0)
        weights, cosines, norms = (self.scatter(values) for values in (weights, cosines, norms))
        return StepRecord(losses, weights, cosines, norms, self.unknown, usage)

    def spread(self, values: Tensor) -> Tensor:  # [a]
        """Put values of the reached objectives at their places among the active ones; NaN elsewhere."""
        if len(self.reached) == self.m:
            return values
        return values.new_full((self.m,), torch.nan).index_copy(0, self.reached_index, values)

    def scatter(self, values: Tensor | None) -> Tensor:
        """Values of the active objectives [a] at their places among all m; NaN elsewhere."""
        if values is None:
            return self.unknown
        values = values.detach().to(self.unknown)
        return values if self.m == len(self.unknown) else self.unknown.index_copy(0, self.active, values)


def last_parameters(model: VAE, gramian_at: str) -> list[nn.Parameter]:
    """Return the parameters that `gramian_at` "last:K" names; none for "shared" and "features".

    Raises ValueError for another name, for a K that the model's shared part does not have, and for a model
    without features.
    """
    if gramian_at == "shared":
        return []
    if not model.has_features:
        raise ValueError(
            f"gramian_at {gramian_at}: {type(model).__name__} has no features, so all its parameters are "
            "shared; valid: shared"
        )
    if gramian_at == "features":
        return []
    kind, _, count = gramian_at.partition(":")
    if kind != "last" or not count.isdecimal():
        raise ValueError(f"gramian_at {gramian_at}: valid: shared, features, last:1, last:2, …")
    modules = model.shared_layers()
    if not 1 <= int(count) <= len(modules):
        raise ValueError(
            f"gramian_at {gramian_at}: the model has {len(modules)} shared layers; "
            f"give last:1 to last:{len(modules)}"
        )
    return [p for parameters in modules[-int(count) :] for p in parameters]


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Run the model on copies of its running statistics: a forward for its gradients alone leaves no mark.

    Copies, not values put back: BatchNorm's backward remembers the very tensors that its forward used.
    """
    kept = [(module, name, b) for module in model.modules() for name, b in module.named_buffers(recurse=False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
