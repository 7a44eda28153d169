"""What a profile says was launched."""

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType


def kernels_of(events: Iterable[Any]) -> list[str]:
    """Names of the kernels that ran on the device: no call of the host's, no copy, no fill, no annotation.

    A profile of CUDA alone also holds the host's calls, cudaLaunchKernel among them.
    """
    return [
        e.name
        for e in events
        if e.device_type == DeviceType.CUDA
        and not e.is_user_annotation
        and not e.name.startswith(("Memcpy", "Memset"))
    ]
