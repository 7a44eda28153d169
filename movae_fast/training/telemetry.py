"""Collect the metrics of the steps since the last log line on the device, and copy them to the host once per
line."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from movae_fast.training.train_step import StepMetrics
from movae_fast.training.world import World

T = TypeVar("T")
Mark = float | torch.cuda.Event  # seconds of the host's clock, or a point in the work of a device's stream
COLLAPSED = 0.02  # a share of codes in use below it is a collapsed codebook
CONFLICT = -1e-3  # a cosine below it is a conflict; above it is what rounding leaves of zero


class NonFiniteError(FloatingPointError):
    """Report that a loss became NaN or infinite, with the step and the objective."""

    def __init__(self, step: int, objective: str, value: float) -> None:
        super().__init__(f"{objective} became {value} at step {step}")
        self.step, self.objective = step, objective


class Times(NamedTuple):
    """Hold the points in time of the steps of a window, as seconds of the host's clock or events of the CUDA
    stream."""

    began: Mark
    ended: Mark
    waits: list[tuple[Mark, Mark]]  # from when a batch was wanted to when it was there
    steps: list[Mark]  # the end of each step


class Snapshot(NamedTuple):
    """Hold the metrics of a finished window while they are being copied to the host."""

    window: Tensor  # [steps, fields, m] on the host
    usage: Tensor  # [K] on the host
    skipped: Tensor  # [steps] on the host, 1 for a step that was left out
    rates: Tensor  # [G] on the host
    line: dict[str, Any]  # what the host knew already
    times: Times
    images: int  # of all ranks
    arrived: torch.cuda.Event | None


class Telemetry:
    """Collect the metrics of a window of steps (losses, weights, cosines, …, [steps, m] each) and the codes'
    usage.

    `close` ends a window and starts copying it to the host; `lines` yields the log lines of windows that have
    arrived. On CUDA the copy runs while the next steps are computed.
    """

    # Fields of StepMetrics, with the prefix that each has in a log line.
    FIELDS: ClassVar = {
        "losses": "",
        "weights": "weight_",
        "cosines": "cos_",
        "norms": "grad_norm_",
        "step_cosines": "step_cosine_",
    }

    def __init__(
        self,
        names: tuple[str, ...],
        size: int,
        device: torch.device,
        codes: Sequence[int] = (),  # of each codebook
        count_skipped: bool = False,
        groups: Sequence[int] = (),  # of each scale
    ) -> None:
        self.count_skipped = count_skipped  # whether steps can be left out, and the log tells how many were
        self.names, self.size, self.device, self.groups = names, size, device, groups
        self.codes = tuple(codes)
        self.window = torch.full((size, len(self.FIELDS), len(names)), torch.nan, device=device)
        self.usage = torch.zeros(sum(codes), device=device)
        self.rates = torch.zeros(sum(groups), device=device)  # summed over the window
        self.skipped = torch.zeros(size, device=device)
        self.filled = 0
        self.seen = self.left_out = 0  # steps whose log lines have been written, and those of them left out
        self.used: float | None = None  # fraction of codes in use in the last window with enough vectors
        self.queue: list[Snapshot] = []
        self.restart_clock()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the given batches, and measure the time spent waiting for them.

        On CUDA that is the time during which the device was idle: a host that waits while the device is still
        busy with earlier steps costs nothing.
        """
        iterator = iter(batches)
        while True:
            wanted = self.mark()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waits.append((wanted, self.mark()))
            yield batch

    def add(self, metrics: StepMetrics, images: int) -> None:
        """Store the metrics of one step of `images` images, without reading anything on the host."""
        self.window[self.filled] = torch.stack([getattr(metrics, k).to(self.window) for k in self.FIELDS])
        if self.count_skipped:
            self.skipped[self.filled] = metrics.skipped
        if self.usage.numel():
            self.usage += metrics.usage.to(self.usage)
        if self.rates.numel():
            self.rates += metrics.rates.to(self.rates)
        self.filled += 1
        self.images += images
        self.steps.append(self.mark())

    def merge(self, world: World) -> None:
        """Average the window's losses, rates and code usage over the processes, in place."""
        if world.size > 1:
            world.sum_(self.rates).div_(world.size)
            world.sum_(self.window[: self.filled, 0]).div_(world.size)
            world.sum_(self.usage).div_(world.size)

    def check(self, last_step: int, world: World) -> None:
        """Raise NonFiniteError if a loss in the window, which ends with `last_step`, is not finite; this reads
        the host once."""
        self.merge(world)
        self._check(self.window[: self.filled].cpu(), self.skipped[: self.filled].cpu(), last_step)

    def _check(self, window: Tensor, skipped: Tensor, last_step: int) -> None:
        bad = (~window[:, 0].isfinite() & (skipped == 0)[:, None]).nonzero()
        if len(bad):
            row, column = (int(v) for v in bad[0])
            step = last_step - len(window) + 1 + row
            raise NonFiniteError(step, self.names[column], float(window[row, 0, column]))

    def close(self, line: dict[str, Any], world: World) -> None:
        """End the window; its metrics are added to `line` (which has `step`) once they have arrived on the
        host."""
        self.merge(world)
        line = line | {"train/peak_memory_mib": self.peak_memory()}
        times = Times(self.began, self.mark(), self.waits, self.steps)
        images = self.images * world.size
        self.restart_clock()
        window = self.window[: self.filled].clone()
        usage, skipped = self.usage * world.size, self.skipped[: self.filled].clone()
        rates = self.rates / max(self.filled, 1)
        arrived = None
        if self.device.type == "cuda":
            rates = rates.to("cpu", non_blocking=True)
            window = window.to("cpu", non_blocking=True)
            usage = usage.to("cpu", non_blocking=True)
            skipped = skipped.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.queue.append(Snapshot(window, usage, skipped, rates, line, times, images, arrived))
        self.filled = 0
        self.window.fill_(torch.nan)
        self.usage.zero_()
        self.skipped.zero_()
        self.rates.zero_()

    def lines(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the log lines of the windows that have arrived on the host; with `wait`, of all finished
        windows.

        Raises NonFiniteError for a loss that is not finite, unless its step was skipped.
        """
        while self.queue:
            snapshot = self.queue[0]
            if snapshot.arrived is not None:
                if not wait and not snapshot.arrived.query():
                    return
                snapshot.arrived.synchronize()
            self.queue.pop(0)
            self._check(snapshot.window, snapshot.skipped, snapshot.line["step"])
            # In a skipped step, values that are not finite do not count as a failure.
            useless = ~snapshot.window.isfinite() & (snapshot.skipped > 0)[:, None, None]
            window = torch.where(useless, torch.nan, snapshot.window)
            means = window.nanmean(0).tolist()
            line = snapshot.line | speed(snapshot.times, snapshot.images)
            if self.count_skipped:
                line["train/skipped_steps"] = int(snapshot.skipped.sum())
                self.seen += len(window)
                self.left_out += line["train/skipped_steps"]
            for kind, values in zip(self.FIELDS.values(), means, strict=True):
                for name, value in zip(self.names, values, strict=True):
                    if not math.isnan(value):
                        line[f"train/{kind}{name}"] = value
            for field, prefix in (("cosines", "train/"), ("step_cosines", "train/step_")):
                line |= conflict_metrics(window[:, list(self.FIELDS).index(field)], prefix)
            codebook = codebook_metrics(snapshot.usage, self.codes)
            # Fewer vectors than codes would leave codes unused in any case.
            if codebook and float(snapshot.usage[: self.codes[0]].sum()) >= self.codes[0]:
                self.used = codebook["codebook_usage"]
            rates = rate_metrics(snapshot.rates, self.groups)
            yield line | {f"train/{k}": v for k, v in (codebook | rates).items()}

    def peak_memory(self) -> float:
        """Return the peak memory in MiB: allocated on the GPU, or on a CPU the process's largest resident
        set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def restart_clock(self) -> None:
        """Start measuring speed anew, so that evaluation, checkpoints and pictures do not count as training
        time."""
        self.began, self.images = self.mark(), 0
        self.waits: list[tuple[Mark, Mark]] = []
        self.steps: list[Mark] = []

    def mark(self) -> Mark:
        """Return the present point in time; on CUDA an event that is reached when the device has done its work
        so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self.window[: self.filled].clone(),
            "usage": self.usage.clone(),
            "skipped": self.skipped[: self.filled].clone(),
            "rates": self.rates.clone(),
            "filled": self.filled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = state["filled"]
        # Older checkpoints have fewer fields.
        self.window[: self.filled, : state["window"].shape[1]] = state["window"]
        self.usage.copy_(state["usage"])
        if "skipped" in state:  # not in the first checkpoints
            self.skipped[: self.filled] = state["skipped"]
        if "rates" in state:  # not in older checkpoints
            self.rates.copy_(state["rates"])
        self.restart_clock()


def seconds(start: Mark, end: Mark) -> float:
    """Return the time in seconds between two marks, which must both have been reached."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return start.elapsed_time(end) / 1e3


def speed(times: Times, images: int) -> dict[str, float]:
    """Return, as metrics, images per second, the fraction of the time spent waiting for data, and milliseconds
    per step (median and 95th percentile)."""
    elapsed = max(seconds(times.began, times.ended), 1e-9)
    metrics = {
        "train/images_per_s": images / elapsed,
        "train/data_wait_share": sum(seconds(*wait) for wait in times.waits) / elapsed,
    }
    if times.steps:
        ordered = sorted(seconds(a, b) for a, b in pairwise([times.began, *times.steps]))
        metrics["train/step_ms_p50"] = 1e3 * statistics.median(ordered)
        metrics["train/step_ms_p95"] = 1e3 * ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
    return metrics


def conflict_metrics(cosines: Tensor, prefix: str) -> dict[str, float]:
    """Summarise how often an update conflicts, from its cosines [steps, m] with each objective's gradient.

    Keys, after `prefix`: `conflict`, the fraction of the measured steps whose smallest cosine is below
    CONFLICT; `min_cosine`, the smallest of all; `conflict_steps`, the number of measured steps, whose cosines
    are not NaN.
    """
    measured = cosines[~cosines.isnan().all(1)]
    if not len(measured):
        return {}
    least = measured.nan_to_num(torch.inf).amin(1)
    return {
        f"{prefix}conflict": float((least < CONFLICT).double().mean()),
        f"{prefix}min_cosine": float(least.min()),
        f"{prefix}conflict_steps": len(measured),
    }


def codebook_metrics(usage: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Return the fraction of codes in use and the perplexity exp(entropy), from the counts of how often each
    was chosen.

    usage: counts of all codebooks, one after the other; sizes: the number of codes of each. With several
    codebooks the fraction is of all codes, the perplexity the geometric mean, and both are also given for each
    codebook as `codebook_usage_1`, `perplexity_1`, … Returns {} without codes.
    """
    if not usage.numel():
        return {}
    used, entropies = [], []
    for counts in usage.double().split(list(sizes)):
        p = counts / counts.sum().clamp_min(1)
        entropies.append(-torch.special.xlogy(p, p).sum())
        used.append((counts > 0).double().mean())
    of_each = torch.stack(used).tolist(), torch.stack(entropies).exp().tolist()
    mean = torch.stack(entropies).mean().exp()
    metrics = {"codebook_usage": float((usage > 0).double().mean()), "perplexity": float(mean)}
    if len(sizes) > 1:
        for i, (part, perplexity) in enumerate(zip(*of_each, strict=True), 1):
            metrics |= {f"codebook_usage_{i}": part, f"perplexity_{i}": perplexity}
    return metrics


def rate_metrics(rates: Tensor, groups: Sequence[int]) -> dict[str, float]:
    """Return a hierarchy's rates [G] as metrics: `rate_group_01`, … per group and `rate_scale_1`, … summed per
    scale.

    `groups` is the number of groups per scale, scale 1 first. Empty without rates.
    """
    if not rates.numel():
        return {}
    of_scales = [float(part.sum()) for part in rates.split(list(groups))]
    named = {f"rate_scale_{i}": value for i, value in enumerate(of_scales, 1)}
    return named | {f"rate_group_{i:02d}": value for i, value in enumerate(rates.tolist(), 1)}
