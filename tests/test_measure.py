"""What benchmarks measure: the GPU's time and memory where the work is there, the host's where it is not."""

import mmap
import time

import pytest
import torch

from benchmarks import measure


class Gpu:
    """A GPU with a clock of its own: work is put on a stream and done later; the host waits only if it asks."""

    def __init__(self, monkeypatch):
        self.queue, self.clock, self.held, self.peak, self.calls = [], 0.0, 100 << 20, 900 << 20, 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.drain)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "peak", self.held))

    def drain(self):
        while self.queue:
            self.queue.pop(0)()

    def work(self, milliseconds, mib=0):
        self.calls += 1

        def run():
            self.clock += milliseconds

        self.peak = max(self.peak, self.held + (mib << 20))
        self.queue.append(run)


class Event:
    def __init__(self, gpu):
        self.gpu, self.at = gpu, None

    def record(self):
        self.gpu.queue.append(lambda: setattr(self, "at", self.gpu.clock))

    def synchronize(self):
        self.gpu.drain()

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpus_time_is_taken_to_the_end_of_its_work(monkeypatch):
    gpu = Gpu(monkeypatch)
    calls = {"slow": lambda: gpu.work(5000.0), "fast": lambda: gpu.work(1000.0)}
    began = time.perf_counter()
    assert measure.interleaved(calls, 3) == {"slow": 5000.0, "fast": 1000.0}
    assert time.perf_counter() - began < 1
    assert gpu.calls == 2 * (measure.WARM_UP + 3)


def test_the_first_calls_on_a_gpu_are_not_timed(monkeypatch):
    gpu = Gpu(monkeypatch)
    times = iter([900.0] * 4 + [7.0] * 10)  # compiling, recording a graph
    assert measure.interleaved({"call": lambda: gpu.work(next(times))}, 1) == {"call": 7.0}


def test_a_gpus_memory_is_its_allocators(monkeypatch):
    gpu = Gpu(monkeypatch)

    def call():
        gpu.work(1.0, mib=64)
        bytearray(300 << 20)  # of the host's memory, which does not count

    assert measure.extra_memory(call) == 64


def test_the_hosts_time_and_memory():
    if measure.on_gpu():
        pytest.skip("this process has used CUDA")
    assert 20 <= measure.interleaved({"sleep": lambda: time.sleep(0.02)}, 3)["sleep"] < 200

    def touch_pages():  # new ones: what other tests of the process have freed may serve torch's allocator
        with mmap.mmap(-1, 300 << 20) as pages:
            pages[::4096] = bytes(300 << 8)

    assert 250 < measure.extra_memory(touch_pages) < 350


def test_what_torchs_allocator_hands_out():
    if measure.on_gpu():
        pytest.skip("this process has used CUDA")

    def call():
        torch.empty(64 << 18)  # MiB of float32, freed at once
        return torch.empty(16 << 18), torch.empty(16 << 18)

    assert measure.allocated_memory(call) == pytest.approx(64, abs=0.1)


def test_a_benchmark_is_timed_to_the_end(monkeypatch):
    gpu = Gpu(monkeypatch)

    class Benchmark:
        def __init__(self):
            self.extra_info = {}

        def pedantic(self, call, rounds):
            for _ in range(rounds):
                call()
                assert not gpu.queue

    benchmark = Benchmark()
    measure.record(benchmark, lambda: gpu.work(1.0, mib=8), 1.0, "bound", rounds=2)
    assert benchmark.extra_info["extra_memory_mib"] == 8


def test_a_process_of_its_own_answers_when_the_gpus_work_is_done(tmp_path):
    torch_of_the_child = (
        "import types; log = open(LOG, 'w', buffering=1); "
        "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: log.write('waited ')); "
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)"
    ).replace("LOG", repr(str(tmp_path / "log")))
    with measure.in_process(torch_of_the_child, "log.write('called ')") as call:
        call()
        call()
    assert (tmp_path / "log").read_text().split() == ["called", "waited"] * 2
