"""Whether csrc's CUDA half can be used is asked once, and answered by a reason."""

from types import SimpleNamespace

import pytest
import torch

from movae_fast.ops import extension


def fake(driver: int, runtime: int = 13000, cuda: bool = True, architectures: str = "75,80,90,120"):
    info = {"cuda": cuda, "architectures": architectures}
    versions = {"cuda_versions": lambda: (driver, runtime)} if cuda else {}
    return SimpleNamespace(build_info=lambda: info, **versions)


CASES = {
    "usable": (fake(13000), [(9, 0)], ""),
    "a newer driver": (fake(14010), [(9, 0)], ""),
    "an older driver of the same major version": (fake(12040, 12080), [(8, 6)], ""),
    "a GPU of the same generation": (fake(13000), [(8, 9), (12, 1)], ""),
    "a newer GPU, by PTX": (fake(13010), [(13, 0)], ""),
    "not built": (None, [(9, 0)], "not built"),
    "no nvcc": (fake(13000, cuda=False), [(9, 0)], "built without nvcc"),
    "no driver": (fake(0), [], "no CUDA driver"),
    "an old driver": (fake(12080), [(9, 0)], "the driver serves CUDA 12.8, the extension was built with 13.0"),
    "an old GPU": (fake(13000), [(9, 0), (7, 0)], "built for 75,80,90,120, not for cuda:1's 70"),
    "a restricted build": (fake(13000, architectures="90"), [(8, 0)], "built for 90, not for cuda:0's 80"),
    "PTX that the driver cannot compile": (fake(12040, 12080), [(13, 0)], "not for cuda:0's 130"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reason(case, monkeypatch):
    csrc, devices, reason = CASES[case]
    monkeypatch.setattr(extension, "csrc", csrc)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    extension.cuda_missing.cache_clear()
    try:
        found = extension.cuda_missing()
        assert reason in found
        assert bool(found) == bool(reason)
        monkeypatch.setattr(extension, "csrc", None)
        assert extension.cuda_missing() == found  # asked once
    finally:
        extension.cuda_missing.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_the_real_extension_has_a_reason():
    assert extension.cuda_missing()
