"""Record a function of tensors once, and replay it as one CUDA graph.

A training step of a small network is hundreds of kernels of a few microseconds each, which the host cannot
launch as fast as a GPU runs them. A CUDA graph launches all of them at once. Its tensors stay at fixed
addresses, so whatever changes from call to call is copied into them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from movae_fast.names import first_line

WARM = 3  # calls of a kind before it is recorded: they compile, choose algorithms, allocate

Outputs = tuple[Tensor, ...]
Work = Callable[[], Outputs]


class Recorder(Protocol):
    """Record work on a device so that it can be replayed: the interface of `CudaGraphs`, which tests
    replace."""

    def warm(self, work: Work) -> Outputs:
        """Run the work under the conditions of a recording (such as its stream), without recording it."""

    def record(self, work: Work) -> Work:
        """Record the work without running it; return a function that runs it on the same tensors."""


class CudaGraphs:
    """Record CUDA graphs that share one memory pool, which is safe since they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> Outputs:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = work()
        current.wait_stream(self.stream)
        for value in outputs:
            value.record_stream(current)
        return outputs

    def record(self, work: Work) -> Work:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # A loader's thread may pin memory meanwhile; only this thread must not.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                outputs = work()
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

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class Recordings:
    """Call a function of tensors, and record each kind of call once it has been made `WARM` times.

    `agree` returns whether all processes passed true: NCCL requires an exchange that is in a graph in one
    process to be in a graph in all of them. If any process cannot record, a warning says so once, `abandon` is
    called, and every later call runs without a graph.
    """

    def __init__(
        self, recorder: Recorder | None, agree: Callable[[bool], bool], abandon: Callable[[], None]
    ) -> None:
        self.recorder, self.agree, self.abandon = recorder, agree, abandon
        self.calls: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, tuple[list[Tensor | None], Work]] = {}

    def __call__(
        self, kind: Hashable, function: Callable[..., Outputs], inputs: Sequence[Tensor | None]
    ) -> Outputs:
        """Return function(*inputs), by replaying the recording of this kind of call if there is one.

        `kind` must determine the function's operations, together with the inputs' shapes and which of them are
        None. A replay overwrites the outputs of the one before.
        """
        if self.recorder is None:
            return function(*inputs)
        key = (kind, *(None if value is None else value.shape for value in inputs))
        if key in self.recorded:
            held, replay = self.recorded[key]
            for place, value in zip(held, inputs, strict=True):
                if place is not None and value is not None:
                    place.copy_(value)
            return replay()
        if self.calls[key] < WARM:
            self.calls[key] += 1
            return self.recorder.warm(lambda: function(*inputs))
        held = [None if value is None else value.clone() for value in inputs]
        recording, reason = self._try(lambda: function(*held))
        if not self.agree(recording is not None):
            reason = reason or "another process could not record it"
            warnings.warn(f"the step is not a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)
            self.recorder = None
            self.recorded.clear()
            self.abandon()
            return function(*inputs)
        assert recording is not None
        self.recorded[key] = held, recording
        return recording()

    def _try(self, work: Work) -> tuple[Work | None, str]:
        """Record the work; return the recording and "", or None and the reason why it failed."""
        assert self.recorder is not None
        try:
            return self.recorder.record(work), ""
        except RuntimeError as error:
            return None, first_line(error, "")
