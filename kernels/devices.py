"""Make a tensor's device the current one for the length of a launch: `on_device`."""

import contextlib
from typing import Any

import torch


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Triton launches on the device of `tensor`; it does nothing on a CPU.

    Triton launches on the current device and its stream, wherever the tensors lie. Without this, tensors on
    cuda:1 are given to a kernel on cuda:0, which cannot read them, or reads them before they are written.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
