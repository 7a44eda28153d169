"""Keep a module's buffers, such as BatchNorm's running statistics, during an extra forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Run the block on copies of the model's buffers, so that an extra forward pass does not change running
    statistics.

    The originals are put back as the same tensors, since BatchNorm's backward pass refers to the very tensors
    that its forward pass used.
    """
    kept = [(module, name, b) for module in model.modules() for name, b in module.named_buffers(recurse=False)]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
