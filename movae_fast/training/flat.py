"""Store the parameters and gradients of a model as views of flat tensors, so that a step works on contiguous
memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from movae_fast.jacobian import Gradients

# Every parameter starts at a multiple of so many elements, which aligns vector loads to 16 bytes or more.
ALIGNMENT = 16


class FlatParameters:
    """Move parameters and gradients into two flat tensors, `data` and `grad` [P]: the shared parameters first,
    then the task parameters.

    The first `n_shared` elements belong to the shared parameters. Each parameter starts at a multiple of
    ALIGNMENT, as does each of the `align` equal stretches into which processes divide the shared part; the
    elements in between are zero. Every parameter and its `.grad` become views of the flat tensors and keep
    their strides (channels-last too). Nothing may replace these views afterwards, such as `.to` or
    `zero_grad(set_to_none=True)`.
    """

    def __init__(self, shared: Sequence[nn.Parameter], task: Sequence[nn.Parameter], align: int = 1) -> None:
        self.shared, self.task = list(shared), list(task)
        size = sum(_aligned(p.numel()) for p in self.shared)
        self.n_shared = _aligned(size, ALIGNMENT * align)
        total = self.n_shared + sum(_aligned(p.numel()) for p in self.task)
        like = (self.shared or self.task)[0]
        self.data, self.grad = like.new_zeros(total).detach(), like.new_zeros(total).detach()
        self.starts: dict[int, int] = {}
        at = 0
        for k, p in enumerate((*self.shared, *self.task)):
            at = self.n_shared if k == len(self.shared) else at
            self.starts[id(p)] = at
            view = self.view(self.data, p)
            view.copy_(p.detach())
            p.data = view
            p.grad = self.view(self.grad, p)
            at += _aligned(p.numel())
        self._task_grads = [self.view(self.grad, p) for p in self.task]
        self._shared_grads = [self.view(self.grad, p) for p in self.shared]

    def view(self, flat: Tensor, p: Tensor) -> Tensor:
        """Return the elements of the tensor `flat` that belong to parameter p, with p's shape and strides."""
        dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
        strides = p.stride() if dense else torch.empty(p.shape).stride()
        return flat.as_strided(p.shape, strides, flat.storage_offset() + self.starts[id(p)])

    @property
    def shared_data(self) -> Tensor:
        return self.data[: self.n_shared]

    def write_task(self, gradients: Gradients, add: bool = False) -> None:
        write(self._task_grads, gradients, add)

    def write_shared(self, gradients: Gradients, add: bool = False) -> None:
        write(self._shared_grads, gradients, add)

    @property
    def shared_grad(self) -> Tensor:
        return self.grad[: self.n_shared]

    @property
    def task_grad(self) -> Tensor:
        return self.grad[self.n_shared :]


class Rows:
    """Hold the Jacobian's rows over the shared parameters in one buffer, with space for the step as a last row.

    Only objectives whose row is not zero by construction have a row here; `nonzero` lists their numbers, in
    order. It is empty until the first batch has been differentiated.
    """

    def __init__(self, flat: FlatParameters, m: int) -> None:
        self.flat, self.m = flat, m
        self._fit([])

    def resize(self, nonzero: Sequence[int]) -> None:
        """Allocate rows for the objectives `nonzero`, unless the buffer has them already."""
        if list(nonzero) != self.nonzero:
            self._fit(nonzero)

    def _fit(self, nonzero: Sequence[int]) -> None:
        self.nonzero = list(nonzero)
        self.index = torch.tensor(self.nonzero, dtype=torch.int64, device=self.flat.data.device)
        self.with_step = self.flat.data.new_zeros(len(self.nonzero) + 1, self.flat.n_shared)
        self.rows, self.step = self.with_step[:-1], self.with_step[-1]
        self.views = [[self.flat.view(row, p) for p in self.flat.shared] for row in self.rows]

    @property
    def complete(self) -> bool:
        """Return whether every objective has a row in the buffer."""
        return len(self.nonzero) == self.m

    def pick(self, values: Tensor) -> Tensor:  # [rows]
        """Select from values for all objectives [m] those of the objectives that have a row."""
        return values if self.complete else values[self.index]

    def spread(self, values: Tensor) -> Tensor:  # [m]
        """Expand values for the stored rows to all objectives [m], with NaN for objectives without a row."""
        if self.complete:
            return values
        return values.new_full((self.m,), torch.nan).index_copy(0, self.index, values)

    def spread_square(self, gramian: Tensor) -> Tensor:  # [m, m]
        """Expand the Gramian of the stored rows to all objectives [m, m], with zeros for objectives without a
        row."""
        if self.complete:
            return gramian
        full = gramian.new_zeros(self.m, self.m)
        full[self.index[:, None], self.index] = gramian
        return full

    def spread_rows(self) -> Tensor:  # [m, n_shared]
        """Return the rows of all objectives [m, n_shared], with zeros for objectives without a stored row."""
        if self.complete:
            return self.rows
        return self.rows.new_zeros(self.m, self.flat.n_shared).index_copy_(0, self.index, self.rows)


def _aligned(size: int, to: int = ALIGNMENT) -> int:
    return -(-size // to) * to


def write(views: Sequence[Tensor], gradients: Gradients, add: bool = False) -> None:
    """Copy gradients into views, or add them with `add`; a gradient that is None counts as zeros."""
    pairs = [(v, g) for v, g in zip(views, gradients, strict=True) if g is not None]
    if pairs:
        targets, values = [v for v, _ in pairs], [g for _, g in pairs]
        if add:
            torch._foreach_add_(targets, values)
        else:
            torch._foreach_copy_(targets, values)
    if not add:
        for view, gradient in zip(views, gradients, strict=True):
            if gradient is None:
                view.zero_()
