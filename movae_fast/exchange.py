"""Average gradients over the processes of a group: what `jacobian.backward(group=)` does in other people's
training loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | Literal["local"] | None


@dataclass(frozen=True)
class Ranks:
    """Hold the process group over which gradients are averaged, and its size; with size 1 every method returns
    its input."""

    group: dist.ProcessGroup | None = None
    size: int = 1

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a contiguous tensor over the processes, in place."""
        if self.size > 1:
            tensor.div_(self.size)  # before the sum, which could overflow in half precision
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Average dense tensors over the processes, in one exchange per dtype and device."""
        if self.size == 1:
            return list(tensors)
        out = list(tensors)
        kinds = {(t.dtype, t.device): None for t in tensors}
        for kind in kinds:
            members = [k for k, t in enumerate(tensors) if (t.dtype, t.device) == kind]
            flat = self.mean_(torch.cat([tensors[k].reshape(-1) for k in members]))
            for k, part in zip(members, flat.split([tensors[k].numel() for k in members]), strict=True):
                out[k] = part.view(tensors[k].shape)
        return out

    def first_(self, tensor: Tensor) -> Tensor:
        """Return the tensor that the group's first process passed, broadcast to all."""
        if self.size > 1:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def agree(self, numbers: Sequence[int], device: torch.device) -> bool:
        """Return whether all processes passed the same numbers; this reads a value on the host."""
        if self.size == 1:
            return True
        both = torch.tensor([*numbers, *(-n for n in numbers)], device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        largest, least = both.chunk(2)
        return torch.equal(largest, -least)


def ranks_of(group: Group) -> Ranks:
    """Return the processes that the argument `group` of `jacobian.backward` stands for.

    A process group stands for itself; "local" and None stand for this process alone. Raises ValueError for None
    where several processes run, since each would silently keep its own gradient, and for a group that this
    process is no member of.
    """
    if isinstance(group, str) and group != "local":
        raise ValueError(f"group must be a process group, 'local' or None; got {group!r}")
    if not (dist.is_available() and dist.is_initialized()):
        if group not in (None, "local"):
            raise ValueError("group: torch.distributed is not initialised in this process")
        return Ranks()
    if isinstance(group, str):
        return Ranks()
    if group is None:
        if dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, and DistributedDataParallel's hooks are not "
                "called here: give group=torch.distributed.group.WORLD to average the gradients over them, or "
                "group='local' to keep this process's own"
            )
        return Ranks()
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group: this process is not a member of it")
    return Ranks(group, size)
