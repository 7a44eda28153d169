"""Speed in the log: of the host's clock on a CPU, of the device's own work on CUDA."""

from types import SimpleNamespace

import pytest
import torch

from movae_fast.training.telemetry import Telemetry
from movae_fast.training.world import World

CPU = torch.device("cpu")


class Event:
    """A point in a device's work, at a scripted time in milliseconds."""

    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        return other.at - self.at


def step_metrics(loss=1.0):
    unknown = torch.full((2,), torch.nan)
    losses = torch.tensor([loss, 2.0])
    return SimpleNamespace(
        losses=losses,
        weights=unknown,
        cosines=unknown,
        norms=unknown,
        step_cosines=unknown,
        usage=torch.zeros(0),
    )


def test_on_a_device_its_events_give_the_times(monkeypatch):
    # Began, then for each of three steps: batch wanted, batch there, step done; the window's end; began anew.
    moments = iter([100, 100, 100, 110, 110, 114, 120, 120, 120, 132, 140, 140])
    monkeypatch.setattr(Telemetry, "mark", lambda self: Event(next(moments)))
    telemetry = Telemetry(("a", "b"), 5, CPU)
    for _ in telemetry.waiting([0, 1, 2]):
        telemetry.add(step_metrics(), images=8)
        if telemetry.filled == 3:
            break
    telemetry.close({"step": 3}, World())
    (line,) = telemetry.lines()
    assert line["train/images_per_s"] == pytest.approx(24 / 0.040)
    assert line["train/data_wait_share"] == pytest.approx(4 / 40)  # only what the device waited for
    assert line["train/step_ms_p50"] == pytest.approx(10)
    assert line["train/step_ms_p95"] == pytest.approx(12)
    assert line["train/a"] == 1.0


def test_on_a_cpu_the_host_s_clock_does(monkeypatch):
    moments = iter([0.0, 0.0, 0.3, 1.0, 1.0, 1.1, 2.0, 2.5, 2.5])
    monkeypatch.setattr("movae_fast.training.telemetry.time.perf_counter", lambda: next(moments))
    telemetry = Telemetry(("a", "b"), 5, CPU)
    for _ in telemetry.waiting([0, 1]):
        telemetry.add(step_metrics(), images=5)
        if telemetry.filled == 2:
            break
    telemetry.close({"step": 2}, World(size=1))
    (line,) = telemetry.lines()
    assert line["train/images_per_s"] == pytest.approx(10 / 2.5)
    assert line["train/data_wait_share"] == pytest.approx(0.4 / 2.5)
    assert line["train/step_ms_p50"] == pytest.approx(1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_s_time_is_the_device_s_not_that_of_its_launch():
    device = torch.device("cuda")
    telemetry = Telemetry(("a", "b"), 5, device)
    for _ in telemetry.waiting(range(3)):
        torch.cuda._sleep(20_000_000)  # some 10 ms of the device; the host returns at once
        telemetry.add(step_metrics(), images=8)
    telemetry.close({"step": 3}, World())
    (line,) = telemetry.lines(wait=True)
    assert line["train/step_ms_p50"] > 3
    assert line["train/data_wait_share"] < 0.5
