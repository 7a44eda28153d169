"""Hold what the benchmarks share: medians of calls in turn, peak extra memory, and rates for bounds on times.

A call that runs on a GPU returns before its work is done. In a process that has used CUDA, times are therefore
measured between two events on the current stream, and memory is what torch's allocator has handed out.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from movae_fast.training.train_step import TrainStep

Call = Callable[[], object]
WARM_UP = (
    5  # calls on a GPU before any is timed: kernels are compiled and chosen, a graph is recorded at the fourth
)


def on_gpu() -> bool:
    """Return whether this process has used CUDA."""
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def warm_up(call: Call) -> None:
    """Make one call on a CPU, or several on a GPU, where kernels are compiled and graphs recorded."""
    call()
    if on_gpu():
        for _ in range(WARM_UP - 1):
            call()
        torch.cuda.synchronize()


def milliseconds(call: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how long one call takes: on a CPU by `clock`, on a GPU until its work on the device is done."""
    if not on_gpu():
        began = clock()
        call()
        return 1e3 * (clock() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    calls: Mapping[str, Call], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median milliseconds of each call over `rounds` rounds, in each of which all are called once.

    So other load on the machine affects all of them alike. With `time.process_time`, on a CPU, the work of this
    process alone is counted.
    """
    for call in calls.values():
        warm_up(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, clock))
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def in_process(setup: str, call: str) -> Iterator[Call]:
    """Yield a call that runs the statement `call` in another process, which has run `setup` before.

    So each of several loops has an allocator of its own.
    """
    wait = "'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized()"
    wait = f"if {wait}: sys.modules['torch'].cuda.synchronize()"
    code = f"import sys\n{setup}\nfor line in sys.stdin:\n    {call}\n    {wait}\n    print('done', flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, bufsize=1, **pipes) as process:  # type: ignore[call-overload]

        def run() -> None:
            process.stdin.write("go\n")
            assert process.stdout.readline() == "done\n", f"the process ended: {setup}"

        try:
            yield run
        finally:
            process.stdin.close()


def extra_memory(call: Call) -> float:
    """Return by how many MiB the peak memory during the call exceeds what was held before.

    It is the GPU's memory in a process that has used CUDA, and else the process's resident set (Linux).
    """
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(field + ":")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1024


def allocated_memory(call: Call) -> float:
    """Return the MiB that torch's allocator has handed out at most during the call, beyond those before it.

    Unlike the resident set it does not depend on what the C library keeps of freed memory.
    """
    if on_gpu():
        return extra_memory(call)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def steps_on(x: torch.Tensor, train_step: TrainStep) -> Call:
    """Return a call that runs the next training step on the batch x, with noise of its own."""
    number = 0

    def run() -> None:
        nonlocal number
        train_step(x, number, train_step.model.draw_noise(len(x)))
        number += 1

    return run


def record(benchmark: Any, call: Call, bound_ms: float, bound: str, rounds: int = 5) -> None:
    """Time the call by pytest-benchmark, and record its extra memory, the threads and a bound on its time.

    bound: how `bound_ms` was computed, in words.
    """
    warm_up(call)
    benchmark.extra_info["extra_memory_mib"] = extra_memory(call)
    benchmark.extra_info["bound_ms"] = bound_ms
    benchmark.extra_info["bound"] = bound
    benchmark.extra_info["threads"] = torch.get_num_threads()

    def finished() -> None:
        call()
        if on_gpu():
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=rounds)


def record_ratios(
    benchmark: Any, label: str, medians: Mapping[str, float], than: str, baseline: Callable[[str], str]
) -> None:
    """Record and print each peer's median, and how many times faster it is than its baseline.

    baseline: peer's name -> the name of its baseline; than: what the baseline is called in the output.
    """
    times = {name: medians[baseline(name)] / ms for name, ms in medians.items()}
    benchmark.extra_info["median_ms"] = dict(medians)
    benchmark.extra_info[f"times_faster_than_{than.replace('-', '_')}"] = times
    benchmark.extra_info["threads"] = torch.get_num_threads()
    for name, ms in medians.items():
        print(f"{label} {name:26s} {ms:9.2f} ms {times[name]:6.2f}x {than}")


@cache
def sgemm_gflops() -> float:
    """Return the rate of float32 matrix products with this run's threads, in 10^9 operations per second: best
    of ten."""
    a, b, out = (torch.randn(2048, 2048) for _ in range(3))
    best = min(interleaved({"mm": lambda: torch.mm(a, b, out=out)}, 1)["mm"] for _ in range(10))
    return 2 * 2048**3 / best / 1e6
