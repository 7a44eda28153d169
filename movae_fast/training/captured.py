"""A whole training step, from images to new parameters; on CUDA recorded once and replayed as one graph.

A step of a small network is hundreds of kernels of a few microseconds each, which the host cannot launch as
fast as a GPU runs them. A CUDA graph launches all of them at once. What varies from step to step therefore
reaches it as the contents of tensors that stay where they are: images, noise, the losses' weights, the learning
rate.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from movae_fast.aggregation.fused import FusedAggregator
from movae_fast.aggregation.weightings import MethodAggregator
from movae_fast.ops import extension
from movae_fast.projected_step import StepMetric
from movae_fast.training.applied_step import AppliedStep
from movae_fast.training.compiled import CompileMode
from movae_fast.training.config import FROM_EXTRA
from movae_fast.training.step import GradientStep, Kind, StepRecord

WARM = 3  # steps of a kind before it is recorded: they compile, choose algorithms, allocate

Work = Callable[[], StepRecord]
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]  # images, noise, shares, scale


class Recorder(Protocol):
    """What makes a graph of work on a device."""

    def warm(self, work: Work) -> StepRecord:
        """Do the work as it will be recorded, without recording it."""

    def record(self, work: Work) -> Work:
        """Record the work without doing it; the function returned does it, on the same tensors."""


class CudaGraphs:
    """Records by CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> StepRecord:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            record = work()
        current.wait_stream(self.stream)
        for value in record:
            value.record_stream(current)
        return record

    def record(self, work: Work) -> Work:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # A loader's thread may pin memory meanwhile, which only this thread must not.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                record = work()
        except RuntimeError:
            # A capture that fails at its end leaves three things undone: the stream, the allocator's search for
            # the graph's own memory, and the default generator's mode, in which the next draw would raise
            # (pytorch/pytorch#172390). A copy of its state has the same seed and offset, and is in no mode.
            torch.cuda.set_stream(current)
            index = self.stream.device.index
            with suppress(RuntimeError):  # which says that it had ended
                torch._C._cuda_endAllocateToPool(index, self.pool)
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
            raise

        def replay() -> StepRecord:
            graph.replay()
            return record

        return replay


class TrainingStep:
    """Gradients, clipping to `max_grad_norm` (0: none), the optimizer's step, and its projection if there is
    one.

    With a `recorder` each kind of step is recorded once it has been done `WARM` times, and replayed from then
    on: the exchanges between processes and fp16's loss scale are part of the recording. Either all processes
    replay, or none. A replay's record is overwritten by the next.
    """

    def __init__(
        self,
        gradient: GradientStep,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float = 0.0,
        recorder: Recorder | None = None,
        step_metric: StepMetric | None = None,
    ) -> None:
        self.gradient, self.optimizer, self.max_grad_norm = gradient, optimizer, max_grad_norm
        self.applied = AppliedStep(gradient, optimizer, step_metric)
        self.recorder = recorder
        self.done: Counter[tuple[object, ...]] = Counter()
        self.recorded: dict[tuple[object, ...], tuple[Inputs, Work]] = {}
        self.adopt()

    def __call__(
        self, x: Tensor, step: int, noise: Tensor, diagnose: bool = False, share: Tensor | None = None
    ) -> StepRecord:
        """Update every parameter by this rank's images x [B, C, S, S] of 0-based `step`; see GradientStep."""
        kind = self.gradient.kind(step, diagnose)
        inputs: Inputs = (x, noise, share, self.gradient.scale_at(step))
        if self.recorder is None:
            return self.run(kind, inputs)
        key = (kind, x.shape, share is None)
        if key in self.recorded:
            held, replay = self.recorded[key]
            for mine, given in zip(held, inputs, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)
            return replay()
        if self.done[key] < WARM:
            self.done[key] += 1
            return self.recorder.warm(lambda: self.run(kind, inputs))
        x, noise, share, scale = inputs
        held = (x.clone(), noise.clone(), None if share is None else share.clone(), scale.clone())
        reason = "another process could not record it"
        try:
            replay = self.recorder.record(lambda: self.run(kind, held))
            recorded = True
        except RuntimeError as error:
            reason, recorded = str(error).strip().partition("\n")[0], False
        # NCCL wants an exchange that is part of a graph to be part of one in every process.
        if not self.gradient.world.all(recorded):
            warnings.warn(f"the step is not a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)
            self.recorder = None
            self.recorded.clear()
            self.gradient.precision.restart()
            return self.run(kind, inputs)
        self.recorded[key] = held, replay
        return replay()

    def run(self, kind: Kind, inputs: Inputs) -> StepRecord:
        record = self.gradient.differentiate(kind, *inputs)
        precision, flat = self.gradient.precision, self.gradient.flat
        precision.unscale_gradients(self.optimizer)
        with self.applied.watched(kind) as watched, record_function("optimizer"):
            if self.max_grad_norm:
                norm = torch.linalg.vector_norm(flat.grad)
                flat.grad.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1))
            precision.step(self.optimizer)
        return record._replace(step_cosines=watched.cosines)

    def adopt(self) -> None:
        """Put what a recorded optimizer reads onto the device: after a state was loaded, and at first."""
        recorded, device = self.recorder is not None, self.gradient.flat.data.device
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=device) if recorded else rate
            if "capturable" in group:
                group["capturable"] = recorded


NOT_ASKED = "not asked for"
# --compile where the whole step is a graph -> the compiler's own mode: no graphs inside it.
CAPTURED_MODES = {"auto": "default", "reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def why_not_captured(
    mode: CompileMode,
    device: torch.device,
    optimizer: str,
    aggregator: nn.Module | None,
) -> str:
    """What keeps a step from being one graph; empty if nothing does."""
    if device.type != "cuda" or mode not in CAPTURED_MODES:
        return NOT_ASKED
    if optimizer in FROM_EXTRA:
        return f"--optimizer {optimizer}"
    if aggregator is not None and not isinstance(aggregator, FusedAggregator):
        return f"TorchJD's {type(aggregator).__name__}"
    if isinstance(aggregator, MethodAggregator) and (missing := extension.cuda_missing()):
        return f"weights on the host: {missing}"
    return ""
