"""Describe the processes that train together: their number and rank, how they exchange tensors and stop
together.

torchrun starts them. Each process computes its slice of the global batch. Jacobian rows are summed over
processes, rather than their Gramians, so that every process applies the update of the union of the batches.
"""

from __future__ import annotations

import atexit
import datetime
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_groups = itertools.count()  # the groups that this process has joined so far, the same number on every rank


@dataclass
class World:
    """Exchange tensors among `size` processes, of which this one has the number `rank`; with one process every
    exchange returns its input."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None  # a gloo group for the host's flags
    _stop: tuple[Tensor, dist.Work] | None = None

    @property
    def main(self) -> bool:
        """Return whether this is process 0, which writes files and to the terminal."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of any strides over the processes, in place, and return it."""
        if self.size > 1:
            # gloo reads a strided view's memory as if the view were contiguous, without an error.
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def start_sum(self, tensor: Tensor) -> Pending:
        """Start summing a contiguous tensor over the processes while the caller goes on computing; `wait` on
        the result."""
        return Pending(dist.all_reduce(tensor, async_op=True) if self.size > 1 else None)

    def start_scatter(self, row: Tensor) -> Pending:
        """Start summing a row [P] over the processes; afterwards only this process's `shard(row)` is valid."""
        if self.size == 1:
            return Pending(None)
        if dist.get_backend() == "gloo":  # whose reduce_scatter is five times slower than its all_reduce
            return Pending(dist.all_reduce(row, async_op=True))
        return Pending(dist.reduce_scatter_tensor(self.shard(row), row, async_op=True))

    def gather_rows(self, rows: Tensor) -> Tensor:  # [n, ...] -> [size * n, ...]
        """Return the rows of all ranks, which have n each, for a statistic that every rank then computes alike.

        The gradient stays on its rank: the same loss on every rank gives a rank's own rows `size` times their
        part of it, as the sum over ranks would.
        """
        return _Gather.apply(rows, self.rank, self.size) if self.size > 1 else rows

    def gather_(self, flat: Tensor) -> None:
        """Collect every process's `shard(flat)` into `flat` [P] on all processes, in place."""
        if self.size > 1:
            mine = self.shard(flat)
            dist.all_gather_into_tensor(flat, mine.clone() if dist.get_backend() == "gloo" else mine)

    def shard(self, flat: Tensor) -> Tensor:
        """Return this process's stretch of columns of `flat` [..., P], a view of 1/size of them."""
        width = flat.shape[-1] // self.size
        return flat[..., self.rank * width : (self.rank + 1) * width]

    def average_buffers(self, model: nn.Module) -> None:
        """Average a model's floating-point buffers, such as running statistics, over the processes, which each
        saw other images."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    self.sum_(buffer).div_(self.size)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite the tensor on every process with process 0's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def broadcast(self, value: object) -> object:
        """Return process 0's Python value on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def all(self, value: bool) -> bool:
        """Return whether every process passed true. All processes must call it at the same point, and wait for
        each other."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.control)
        return bool(flag)

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on process 0 alone; every process returns its result, or raises its OSError or
        ValueError."""
        if self.size == 1:
            return work()
        answer: object = None
        if self.main:
            try:
                answer = work()
            except (OSError, ValueError) as error:
                answer = error
        answer = self.broadcast(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    def agree(self, signum: int) -> int:
        """Return the largest signal number that any process passed to the previous call, the same on all
        processes.

        The answer is one step late, so that the exchange runs in the background and no process waits for it.
        """
        if self.size == 1:
            return signum
        answer = 0
        if self._stop is not None:
            flag, work = self._stop
            work.wait()
            answer = int(flag)
        flag = torch.tensor(signum)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control, async_op=True)
        self._stop = (flag, work)
        return answer

    def close(self) -> None:
        """Leave the process group, which would otherwise be torn down uncleanly at the interpreter's exit."""
        if self._stop is not None:
            self._stop[1].wait()
            self._stop = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.place = slice(rank * len(rows), (rank + 1) * len(rows))
        ctx.size = size
        out = rows.new_empty((size * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.place] * ctx.size, None, None


class Pending:
    """Stand for an exchange that is in progress, on memory that the caller keeps; `wait` returns when it is
    done."""

    def __init__(self, work: dist.Work | None) -> None:
        self.work = work

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


def connect(device: str) -> tuple[World, str]:
    """Join the processes that torchrun started; return the world and the name of the device that this process
    uses.

    Without torchrun the world has one process. GPUs exchange by nccl, CPUs by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), device
    if "MASTER_ADDR" not in os.environ:
        raise ValueError("WORLD_SIZE is set but MASTER_ADDR is not: start the processes with torchrun")
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if ":" in device:
            raise ValueError(f"--device {device}: under torchrun each process takes its own GPU; use cuda")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}; lower --nproc_per_node, or use --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=30)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store, and in it the addresses of groups that have ended (torch 2.11), when it
        # restarts processes and when a process trains twice. A new group that read one would wait for a
        # process that is gone until the timeout, or talk to another group of the same process.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}/group_{next(_groups)}", store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    world = World(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
    atexit.register(world.close)
    return world, device
