"""What tests on a GPU rest on, checked without one: torch's harmless warnings, and how launches are counted."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import compile_fx
from torch.autograd import DeviceType
from torch.profiler import profiler

from tests.launches import kernels_of


def test_the_hint_at_tf32_is_no_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    warn = compile_fx._warn_tf32_disabled.__wrapped__  # without the cache that says it once
    with pytest.warns(UserWarning, match="TensorFloat32"):
        warn()
    warn()


def test_a_profile_of_one_cycle_is_no_error(monkeypatch):
    monkeypatch.setattr(profiler, "_WARNINGS_SHOWN", set())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        torch.ones(2).sum()
    assert profiler._WARNINGS_SHOWN  # it was said


def test_the_guard_against_waiting_is_no_error():
    # As torch's libraries hold it; only a GPU makes torch say it.
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
        "operations",
        UserWarning,
        stacklevel=1,
    )


@pytest.mark.parametrize(
    "text", ["called a synchronizing CUDA operation", "TensorFloat32", "Profiler clears events"]
)
def test_any_other_warning_is_an_error(text):
    with pytest.raises(UserWarning):
        warnings.warn(text, UserWarning, stacklevel=1)


def test_launches_are_the_devices_kernels_alone():
    def event(name, device, annotation=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("cudaLaunchKernel", DeviceType.CPU),
        event("cuLaunchKernelEx", DeviceType.CPU),
        event("cudaDeviceSynchronize", DeviceType.CPU),
        event("Memset (Device)", DeviceType.CUDA),
        event("Memcpy DtoD (Device -> Device)", DeviceType.CUDA),
        event("optimizer", DeviceType.CUDA, annotation=True),
        event("void movae::upgrad_kernel<float>(float const*)", DeviceType.CUDA),
        event("_combine_kernel", DeviceType.CUDA),
        event("triton_poi_fused_add_0", DeviceType.CUDA),
    ]
    assert len(kernels_of(events)) == 3
