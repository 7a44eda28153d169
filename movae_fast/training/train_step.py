"""Define a whole training step, from images to new parameters.

`TrainStep.update` reads from top to bottom: forward, rows, exchange, Gramian, weights, combine, clipping, the
optimizer. The ways to differentiate a batch are in `gradients`. On CUDA the whole step is recorded once and
replayed as one graph (`cuda_graph`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from movae_fast import ops
from movae_fast.aggregation.registry import aggregate, is_fused, is_weighting
from movae_fast.choices import StepMetric
from movae_fast.jacobian import cosines_with_update
from movae_fast.models import VAE, Noise
from movae_fast.models.buffers import keeping_buffers
from movae_fast.objectives import LossVector
from movae_fast.ops import extension
from movae_fast.projected_step import Columns, step_cosines
from movae_fast.training import gradients
from movae_fast.training.adversary import Adversary
from movae_fast.training.applied_step import StepProjection
from movae_fast.training.average import WeightAverage
from movae_fast.training.compiled import MULTIRATE_LIMITS, Compiled, CompileMode
from movae_fast.training.config import FROM_EXTRA
from movae_fast.training.cuda_graph import Recorder, Recordings
from movae_fast.training.flat import FlatParameters, Rows, write
from movae_fast.training.gradients import Batch, Differentiated, Network
from movae_fast.training.guarded_step import StepGuard
from movae_fast.training.optim import make_capturable
from movae_fast.training.precision import Precision
from movae_fast.training.world import Pending, World


class StepMetrics(NamedTuple):
    """Hold the metrics of one step for the log, on the device: [m] each over all objectives unless stated, NaN
    where not computed."""

    losses: Tensor  # unweighted, of this rank's images
    weights: Tensor  # the aggregator's
    cosines: Tensor  # of the aggregated gradient with each objective's, both of the whole batch
    norms: Tensor  # of each objective's gradient
    step_cosines: Tensor  # of the applied change of the parameters with each objective's gradient
    usage: Tensor  # [K] how often each code was chosen; [0] without a codebook
    skipped: Tensor  # [] 1 for a step that was left out
    rates: Tensor  # [G] mean KL of each group of a hierarchy, nats; [0] without one


class Gradient(Enum):
    """Enumerate the ways in which a step's gradient is computed."""

    SUM = "one backward of the weighted sum"
    ROWS = "the aggregated rows of the whole batch"
    REUSED_WEIGHTS = "one backward with the weights of an earlier step"
    CHEAP_GRAMIAN = "one backward with the weights of the rows at another place"
    SUBSET = "one backward with the weights of the batch's first images"


class Part(Enum):
    """Name the parameters that a step updates. The gradients and the norm for clipping are of all parameters in
    any case."""

    ALL = "all parameters"
    SHARED = "the shared parameters alone"
    TASK = "the task parameters alone"


class Kind(NamedTuple):
    """Describe what a step does; all batches of the same kind and shape run the same kernels."""

    gradient: Gradient
    rows: bool = False  # whether all rows of the whole batch are in `TrainStep.rows` afterwards
    log: bool = False  # whether the step is one that is logged
    part: Part = Part.ALL


class TrainStep:
    """Update every parameter by a batch's vector of losses.

    aggregator: None runs one ordinary backward pass of the weighted sum; rows are then computed only on steps
        that are logged, and do not affect the update.
    optimizer: without one, only `gradient` and `differentiate` can be used.
    jacobian: "shared" aggregates the gradients of the part before the features (as MO-VAE does), "all" those of
        every parameter.
    gramian_every, gramian_batch, gramian_at: three approximations, off by default. With `gramian_every` k the
        weights computed in one step are used in the k - 1 steps after it too; with `gramian_batch` f the
        Gramian is that of the first fraction f of the batch; with `gramian_at` "features" or "last:K" it is
        that of the gradients at the features, or at the parameters of the last K shared layers before them
        (`VAE.shared_layers`). The update is then one backward pass of the weighted losses. On steps that are
        logged the exact rows are computed too, so that the logged cosines are the true ones.
    accumulate: k splits the batch into k parts that are differentiated one after the other. Rows are summed
        before they are aggregated, so the update is that of the whole batch.
    max_grad_norm, skip_grad_norm: the gradient (of the model's penalty too, if the losses' schedule gives it a
        weight) is clipped to the first (0: not at all), and a step whose gradient is longer than the second (0:
        none) is skipped (`guarded_step`).
    clip_apart: clip the gradients of the shared and of the task parameters, each to `max_grad_norm`.
    step_metric: project the optimizer's step in this metric (`projected_step`); None does not.
    ema_decay: keep an average of the weights with this decay (0: none).
    recorder: record each kind of step as one CUDA graph, the exchanges between processes and fp16's loss
        scaling included. A replay overwrites the metrics of the one before.

    Raises ValueError for a `gramian_at` that the model or the aggregator does not support, and for "shared"
    with a model that encodes a second time.
    """

    def __init__(
        self,
        model: VAE,
        losses: LossVector,
        aggregator: nn.Module | None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        jacobian: str = "shared",
        max_grad_norm: float = 0.0,
        clip_apart: bool = False,
        skip_grad_norm: float = 0.0,
        ema_decay: float = 0.0,
        step_metric: StepMetric | None = None,
        precision: Precision | None = None,
        compile_mode: str = "off",
        world: World | None = None,
        accumulate: int = 1,
        gramian_every: int = 1,
        gramian_batch: float = 1.0,
        gramian_at: str = "shared",
        recorder: Recorder | None = None,
        adversaries: Sequence[Adversary] = (),
    ) -> None:
        check_cut(model, aggregator, jacobian, gramian_at)
        self.model, self.losses, self.aggregator, self.optimizer = model, losses, aggregator, optimizer
        self.precision = precision or Precision("fp32", model.device)
        self.world = world or World()
        self.accumulate, self.max_grad_norm, self.clip_apart = accumulate, max_grad_norm, clip_apart
        self.gramian_every, self.gramian_batch, self.gramian_at = gramian_every, gramian_batch, gramian_at
        self.last = gradients.last_parameters(model, gramian_at)
        self.first = 0  # the step that gramian_every counts from: a new stage's losses need new weights
        task = [p for parameters in model.task_parameters().values() for p in parameters]
        shared = model.shared_parameters()
        if jacobian == "all":
            shared, task = [*shared, *task], []
        self.flat = FlatParameters(shared, task, align=self.world.size)
        self.network = Network(model, losses, self.precision, shared, task, cut=jacobian == "shared")
        self.m = len(losses.active)
        self.active = torch.tensor(losses.active, device=model.device)
        # The metrics that a step does not compute: one tensor for all of them, since nothing writes into it.
        self.unknown = torch.full((len(losses.names),), torch.nan, device=model.device)
        self.never = torch.zeros((), device=model.device)
        self.rows = Rows(self.flat, self.m)
        # The last finite weights [m], for the steps that reuse them: part of a checkpoint.
        self.weights = torch.full((self.m,), 1 / self.m, dtype=torch.float64, device=model.device)
        self.columns = Columns(self.world.shard, self.world.sum_, self.world.gather_)
        self.adversaries = adversaries  # trained after each step
        self.projection = None
        if step_metric is not None and optimizer is not None:
            self.projection = StepProjection(step_metric, optimizer, self.flat, self.columns)
        self.average = WeightAverage(self.flat, ema_decay) if ema_decay else None
        self.guard = None
        if optimizer is not None and (skip_grad_norm or (ema_decay and self.precision.scaler is not None)):
            self.guard = StepGuard(optimizer, model, skip_grad_norm, self.world)
        # Add the penalty after aggregation: as an objective it could dominate an aggregator's step.
        self.penalised = None if losses.schedule.penalty is None else model.penalised()
        self.compile_regions(compile_mode)
        self.recordings = Recordings(recorder, self.world.all, self.precision.restart)
        self.prepare_optimizer()

    def __call__(
        self,
        images: Tensor,
        step: int,
        noise: Noise,
        log: bool = False,
        sample_weight: Tensor | None = None,
        part: Part = Part.ALL,
    ) -> StepMetrics:
        """Run one step: update the parameters of `part` from this process's images [B, C, S, S].

        step: its 0-based number. noise: the model's noise for the B images (`VAE.draw_noise`). log: whether the
        step is logged, so that rows and cosines are computed for its metrics. sample_weight: [B] how often each
        image counts, see `objectives`.
        """
        self.losses.set_step(step)
        batch, scale = Batch(images, noise, sample_weight), self.scale_at(step)
        kind = self.kind(step, log)._replace(part=part)
        if self.recordings.recorder is None:
            return self.update(kind, batch, scale)
        inputs = (scale, *batch.tensors())
        return StepMetrics(*self.recordings(kind, partial(self.update_by_tensors, kind), inputs))

    def gradient(
        self,
        images: Tensor,
        step: int,
        noise: Noise | None = None,
        log: bool = False,
        sample_weight: Tensor | None = None,
    ) -> StepMetrics:
        """Set every parameter's `.grad` as a step does, without updating the parameters; noise is drawn if not
        given."""
        noise = self.model.draw_noise(len(images)) if noise is None else noise
        batch = Batch(images, noise, sample_weight)
        self.losses.set_step(step)
        metrics = self.differentiate(self.kind(step, log), batch, self.scale_at(step))
        self.add_penalty(self.precision.loss_scale())
        return metrics

    def update_by_tensors(self, kind: Kind, scale: Tensor, *batch: Tensor) -> StepMetrics:
        """Call `update` with the batch as separate tensors, the form in which a CUDA graph is recorded."""
        return self.update(kind, Batch.of_tensors(*batch), scale)

    def update(self, kind: Kind, batch: Batch, scale: Tensor) -> StepMetrics:
        """Differentiate the batch, clip the gradient, run the optimizer, project its step, and average the
        weights.

        `scale` [a] has the factors on the active losses.
        """
        assert self.optimizer is not None
        if self.guard is not None:
            self.guard.begin()
        metrics = self.differentiate(kind, batch, scale)
        with record_function("optimizer"):
            self.precision.unscale_gradients(self.optimizer)
            self.add_penalty()
            if self.max_grad_norm or self.guard is not None:
                norm = torch.linalg.vector_norm(self.flat.grad)
                if self.guard is not None:
                    self.guard.judge(norm, metrics.losses)
                self.clip(norm)
            looked_at = kind.rows and len(self.rows.nonzero) > 0 and (kind.log or self.projection is not None)
            before = self.flat.shared_data.clone() if looked_at else None
            with without_gradients(self.left_alone(kind.part)):
                if self.precision.scaler is None:
                    self.optimizer.step()
                else:  # the scaler leaves out a step whose gradients overflowed
                    self.precision.scaler.step(self.optimizer)
                    self.precision.scaler.update()
            left_out = None if self.guard is None else self.guard.end()
        if before is not None:
            if self.projection is not None:
                self.projection.correct(self.rows, before, self.precision.loss_scale(), keep_rows=kind.log)
            if kind.log:
                metrics = metrics._replace(step_cosines=self.step_cosines(before))
        if self.average is not None and kind.part is not Part.SHARED:  # once per batch
            self.average.update(left_out)
        for adversary in self.adversaries:
            adversary.step()
        return metrics if left_out is None else metrics._replace(skipped=left_out)

    def differentiate(self, kind: Kind, batch: Batch, scale: Tensor) -> StepMetrics:
        """Set every parameter's `.grad`: forward, rows, exchange, Gramian, weights, combine.

        `scale` [a] has the factors on the active losses.
        """
        parts = batch.split(self.accumulate)
        if kind.gradient is Gradient.ROWS:
            results = self.fill_rows(parts, scale)
            return self.metrics(results, *self.aggregate_rows(self.gramian()))
        if kind.rows:  # exact rows for the log alone; `.grad` is overwritten below
            with keeping_buffers(self.model):
                self.fill_rows(parts, scale)
        if kind.gradient is Gradient.SUM:
            results = [self.write(self.by_sum(self.network, p, scale), k) for k, p in enumerate(parts)]
            weights = torch.ones(self.m, device=self.active.device)
        else:
            results, weights = self.approximated(kind.gradient, parts, scale), self.weights
        self.world.sum_(self.flat.grad)
        if not kind.rows:
            return self.metrics(results, None if kind.gradient is Gradient.SUM else weights)
        return self.metrics(
            results, weights, *cosines_with_update(self.gramian(), weights, self.rows.rows, None)
        )

    def clip(self, norm: Tensor) -> None:
        """Clip the gradient to `max_grad_norm`; with `clip_apart` the shared and the task part each.

        norm: that of the whole gradient, [].
        """
        if not self.max_grad_norm:
            return
        clipped = [(self.flat.grad, norm)]
        if self.clip_apart:
            clipped = [(g, torch.linalg.vector_norm(g)) for g in (self.flat.shared_grad, self.flat.task_grad)]
        for gradient, norm in clipped:
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
            # Times NaN, what lies between the parameters would be NaN for good, and so every norm.
            gradient.mul_(torch.where(norm.isfinite(), factor, 1.0))

    def add_penalty(self, scale: Tensor | None = None) -> None:
        """Add the gradient of the model's penalty, times `scale` [], to `.grad`; it is the same in every
        process."""
        if self.penalised is None:
            return
        weight, parameters = self.losses.penalty_weight, self.penalised.parameters()
        weight = weight if scale is None else weight * scale
        results = self.by_penalty(self.model, self.penalised, parameters, weight)
        write([self.flat.view(self.flat.grad, p) for p in parameters], results, add=True)

    # What a step does, and by which functions.

    @property
    def approximate(self) -> bool:
        """Return whether an approximation is on, so that some updates are computed without the exact rows."""
        return self.gramian_every > 1 or self.gramian_batch < 1 or self.gramian_at != "shared"

    def kind(self, step: int, log: bool = False) -> Kind:
        """Return what is done at the 0-based `step`: how the gradient is computed, and whether exact rows
        are."""
        if self.aggregator is None:
            return Kind(Gradient.SUM, log, log)
        if (step - self.first) % self.gramian_every:
            return Kind(Gradient.REUSED_WEIGHTS, log, log)
        if self.gramian_at != "shared":
            return Kind(Gradient.CHEAP_GRAMIAN, log, log)
        if self.gramian_batch < 1:
            return Kind(Gradient.SUBSET, log, log)
        return Kind(Gradient.ROWS, True, log)

    def left_alone(self, part: Part) -> list[nn.Parameter]:
        """Return the parameters that a step of this part must not update."""
        return {Part.ALL: [], Part.SHARED: self.flat.task, Part.TASK: self.flat.shared}[part]

    def scale_at(self, step: int) -> Tensor:  # [a]
        """Return the factors [a] on the active losses at the 0-based `step`: loss weights over parts and
        processes, times fp16's loss scale."""
        # Sums over parts and ranks are means of the batch when each part's losses are divided beforehand.
        scale = self.losses.weights_at(step)[self.active] / (self.accumulate * self.world.size)
        return self.precision.scale(scale)

    def compile_regions(self, mode: str) -> None:
        """Wrap the functions that differentiate, so that each is compiled as one region if `mode` asks for
        it."""
        limits = MULTIRATE_LIMITS if getattr(self.model, "rates", None) is not None else None
        self.by_rows = Compiled(gradients.exact_rows, mode, limits)
        self.by_weights = Compiled(gradients.of_weighted, mode, limits)
        self.by_sum = Compiled(gradients.of_sum, mode, limits)
        self.by_penalty = Compiled(gradients.of_penalty, mode)
        # One graph from the losses to the weighted gradient, if that needs no other process and no host.
        one_graph = is_fused(self.aggregator) and self.world.size == 1
        self.by_cheap_gramian = Compiled(gradients.of_cheaply_weighted, mode if one_graph else "off", limits)

    def compiles(self) -> str:
        """Return the names of the functions that the next call may compile first, for the progress bar; "" if
        none."""
        if self.aggregator is None:
            regions = [self.by_sum]
        elif self.gramian_at != "shared":
            reuses = self.gramian_every > 1 or self.accumulate > 1
            regions = [self.by_cheap_gramian, self.by_weights] if reuses else [self.by_cheap_gramian]
        else:
            regions = [self.by_rows, self.by_weights] if self.approximate else [self.by_rows]
        return ", ".join(region.name for region in regions if region.pending)

    def prepare_optimizer(self) -> None:
        """Move the optimizer's learning rate to the device if the step is recorded; call this again after
        loading a state."""
        if self.optimizer is not None:
            recorded = self.recordings.recorder is not None
            make_capturable(self.optimizer, self.flat.data.device if recorded else None)

    # Rows, their Gramian, their weights.

    def fill_rows(self, parts: Sequence[Batch], scale: Tensor) -> list[Differentiated]:
        """Compute the rows of the whole batch into `self.rows`, and the task parameters' gradients; both are
        summed over the processes."""
        results: list[Differentiated] = []
        pending: list[Pending] = []
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            with record_function("forward and rows"):
                result = self.by_rows(self.network, part, scale)
            self.flat.write_task(result.task, add=k > 0)
            if last:
                pending.append(self.world.start_sum(self.flat.task_grad))
            self.rows.resize(result.nonzero)
            for row, views, gradient in zip(self.rows.rows, self.rows.views, result.shared, strict=True):
                write(views, gradient, add=k > 0)
                if last:  # now, so that the exchange overlaps with the next row's backward
                    pending.append(self.world.start_scatter(row))
            results.append(self.kept(result))
        for exchange in pending:
            exchange.wait()
        return results

    def gramian(self) -> Tensor:  # [m, m] float64
        """Return the Gramian [m, m] of the rows, each process contributing its stretch of columns; unscaled for
        fp16."""
        with record_function("gramian"):
            gramian = self.columns.gramian(self.rows.rows)
            return self.rows.spread_square(self.precision.unscaled(gramian))

    def weigh(self, gramian: Tensor) -> Tensor:  # [m]
        """Return the aggregator's weights [m] for a Gramian [m, m] of scaled rows; the previous weights if they
        are not finite.

        A step that overflowed in fp16 is skipped, and must not spoil the weights that later steps reuse.
        """
        assert self.aggregator is not None
        gramian = self.precision.unscaled(gramian)
        if self.hides(gramian):
            return self.weights
        weights = self.aggregator.gramian_weighting(gramian)  # type: ignore[operator]
        return torch.where(weights.isfinite().all(), weights, self.weights)

    def hides(self, gramian: Tensor) -> bool:
        """Return whether the aggregator must not be given this Gramian, which is not finite and whose step will
        be skipped.

        This concerns TorchJD's aggregators on the host: some raise for such a Gramian, some keep it in their
        state.
        """
        on_host = not is_fused(self.aggregator)
        left_out = self.guard is not None or self.precision.scaler is not None
        return on_host and left_out and not bool(gramian.isfinite().all())

    def aggregate_rows(self, gramian: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Write the aggregated rows into the shared parameters' `.grad`.

        Returns the weights [m], or None, and the cosine of each row with the update and each row's norm, [m]
        each.
        """
        assert self.aggregator is not None
        rows = self.rows.rows
        if self.hides(gramian):
            self.flat.shared_grad[:1].fill_(torch.nan)  # an element of a parameter, not padding: skips the step
            unknown = self.unknown[self.active]
            return None, unknown, unknown
        if is_weighting(self.aggregator):
            with record_function("projection"):
                weights = self.aggregator.gramian_weighting(gramian)  # type: ignore[operator]
            with record_function("combine"):
                mine = self.columns.stretch(self.flat.shared_grad)
                ops.combine(self.columns.stretch(rows), self.rows.pick(weights), out=mine)
                self.columns.gather(self.flat.shared_grad)
            self.weights.copy_(torch.where(weights.isfinite().all(), weights, self.weights))
            return weights, *cosines_with_update(gramian, weights, rows, None)
        # Aggregators that look at single elements need whole rows on every rank.
        for row in rows if self.world.size > 1 else ():
            self.world.gather_(row)
        rows = self.rows.spread_rows()
        with record_function("aggregation"):
            update, known = aggregate(self.aggregator, rows, gramian)
            self.flat.shared_grad.copy_(update)
        if known is not None:
            self.weights.copy_(known)
        return known, *cosines_with_update(gramian, known, rows, update)

    # Weights without all rows of the whole batch.

    def approximated(self, gradient: Gradient, parts: Sequence[Batch], scale: Tensor) -> list[Differentiated]:
        """Compute weights without the exact rows, or reuse the previous ones, and differentiate the weighted
        losses."""
        done: list[Differentiated] = []
        if gradient is Gradient.SUBSET:
            count = max(2, round(len(parts[0].images) * self.gramian_batch))
            result, weights = gradients.of_subset_weighted(
                self.network, parts[0], scale, count, self.weigh_parameter_rows
            )
            self.weights.copy_(weights)
            done = [self.write(result, 0)]
        elif gradient is Gradient.CHEAP_GRAMIAN and len(parts) == 1:
            result, weights = self.by_cheap_gramian(
                self.network, parts[0], scale, self.last, self.weigh_cheap_rows
            )
            self.weights.copy_(weights)
            done = [self.write(result, 0)]
        elif gradient is Gradient.CHEAP_GRAMIAN:
            # The weights depend on the whole batch, so all parts go forward before any goes backward.
            with keeping_buffers(self.model):
                rows = [gradients.cheap_rows_of(self.network, part, scale, self.last) for part in parts]
            self.weights.copy_(self.weigh_cheap_rows(*rows))
        for k, part in enumerate(parts[len(done) :], len(done)):
            done.append(self.write(self.by_weights(self.network, part, scale, self.weights), k))
        return done

    def weigh_parameter_rows(self, *rows: Tensor) -> Tensor:  # [m]
        """Return the aggregation weights [m] from rows of gradients at some parameters.

        The rows are summed over the parts of the batch and over the processes before they are weighed.
        """
        total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        return self.weigh(ops.gramian(self.world.sum_(total)))

    def weigh_cheap_rows(self, *rows: Tensor) -> Tensor:  # [m]
        """Return the weights [m] for the approximate rows of `gramian_at`, over the batch's parts and the
        processes.

        Rows at parameters are added. For rows at features the Gramians are added, since each image has its own
        features.
        """
        if self.last:
            return self.weigh_parameter_rows(*rows)
        gramians = [ops.gramian(part) for part in rows]
        return self.weigh(self.world.sum_(gramians[0] if len(gramians) == 1 else torch.stack(gramians).sum(0)))

    # From gradients to `.grad` and the metrics.

    def write(self, result: Differentiated, k: int) -> Differentiated:
        """Write the gradients of part k of the batch into `.grad`, adding them to those of the parts before."""
        self.flat.write_task(result.task, add=k > 0)
        (row,) = result.shared
        self.flat.write_shared(row, add=k > 0)
        return self.kept(result)

    def kept(self, result: Differentiated) -> Differentiated:
        """Return the losses, usage and rates of a part, without its gradients, to be kept while other parts are
        computed.

        With several parts they are copied, since a graph replayed by `--compile reduce-overhead` overwrites its
        outputs.
        """
        if self.accumulate == 1:
            return Differentiated(result.losses, result.usage, result.rates)
        return Differentiated(result.losses.clone(), result.usage.clone(), result.rates.clone())

    def metrics(
        self,
        results: Sequence[Differentiated],
        weights: Tensor | None,
        cosines: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> StepMetrics:
        """Combine the results of the batch's parts into the step's metrics, in the order of all objectives."""
        losses = results[0].losses if len(results) == 1 else torch.stack([r.losses for r in results]).mean(0)
        usage = results[0].usage if len(results) == 1 else torch.stack([r.usage for r in results]).sum(0)
        rates = results[0].rates if len(results) == 1 else torch.stack([r.rates for r in results]).mean(0)
        weights, cosines, norms = (self.of_all(values) for values in (weights, cosines, norms))
        return StepMetrics(losses, weights, cosines, norms, self.unknown, usage, self.never, rates)

    def step_cosines(self, before: Tensor) -> Tensor:  # [m] over all objectives
        """Return the cosine of each objective's row with the step that was applied to the shared parameters,
        [m]; `before` holds them before it."""
        torch.sub(before, self.flat.shared_data, out=self.rows.step)
        return self.of_all(self.rows.spread(step_cosines(self.columns.gramian(self.rows.with_step))))

    def of_all(self, values: Tensor | None) -> Tensor:
        """Expand values of the active objectives [a] to all objectives [m], with NaN for the others."""
        if values is None:
            return self.unknown
        values = values.detach().to(self.unknown)
        return values if self.m == len(self.unknown) else self.unknown.index_copy(0, self.active, values)


def check_cut(model: VAE, aggregator: nn.Module | None, jacobian: str, gramian_at: str) -> None:
    """Raise ValueError if the gradients at the features are not what `jacobian` and `gramian_at` need."""
    if jacobian == "shared" and model.passes_again:
        raise ValueError('jacobian "shared": the model encodes a second time, past its features; give "all"')
    if gramian_at != "shared" and (aggregator is None or not is_weighting(aggregator)):
        raise ValueError(f"gramian_at {gramian_at}: the aggregator must weight rows by their Gramian alone")


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Hide the gradients of these parameters inside a `with` block, so that an optimizer skips them."""
    kept = [(p, p.grad) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient


NOT_ASKED = "not asked for"
# --compile where the whole step is a graph -> the compiler's own mode: no graphs inside it.
CAPTURED_MODES = {"auto": "default", "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def why_not_captured(
    mode: CompileMode, device: torch.device, optimizer: str, aggregator: nn.Module | None
) -> str:
    """Return the reason why a step cannot be recorded as one CUDA graph; "" if it can."""
    if device.type != "cuda" or mode not in CAPTURED_MODES:
        return NOT_ASKED
    if optimizer in FROM_EXTRA:
        return f"--optimizer {optimizer}"
    if aggregator is not None and not is_fused(aggregator):
        return f"TorchJD's {type(aggregator).__name__}"
    if aggregator is not None and (missing := extension.cuda_missing()):
        # Imports TorchJD, which is loaded by now.
        from movae_fast.aggregation.weightings import MethodWeighting

        if any(isinstance(module, MethodWeighting) for module in aggregator.modules()):
            return f"weights on the host: {missing}"
    return ""
