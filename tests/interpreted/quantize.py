"""Quantisation's strides, the distance to given codes, and the device that both launch on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.kernels import nearest_code as search
from movae_fast.kernels import quantize as quantizer
from movae_fast.ops.quantize import (
    _code_error_cuda,
    _code_error_fake,
    _quantize_backward_cuda,
    _quantize_fake,
)

LAYOUTS = {
    "rows": lambda z: z,
    "strided rows": lambda z: z.T.contiguous().T,
    "wide rows": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "map": lambda z: z.view(2, 5, 6, -1).permute(0, 3, 1, 2).contiguous(),
    "channels last": lambda z: z.view(2, 5, 6, -1).permute(0, 3, 1, 2),
    "transposed map": lambda z: z.view(2, 6, 5, -1).permute(0, 3, 1, 2).contiguous().transpose(2, 3),
    "every other position": lambda z: z.view(2, 5, 6, -1).permute(0, 3, 1, 2).contiguous()[:, :, :, ::2],
    "line": lambda z: z.view(2, 30, -1).transpose(1, 2).contiguous(),
    "none": lambda z: z[:0],
}


def laid_out(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, c = torch.randn(60, 20, generator=generator), torch.randn(37, 20, generator=generator)
    return LAYOUTS[name](z.to(device, dtype)), c.to(device, dtype)


def rows_of(z: Tensor) -> Tensor:
    return z if z.dim() == 2 else z.movedim(1, -1).reshape(-1, z.shape[1])


def alike(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> None:
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_has_the_strides_that_its_fake_promises(layout: str, deterministic: bool, device: str) -> None:
    z, c = laid_out(layout, torch.float32, device)
    real = quantizer.quantize(z, c, deterministic)
    alike(real, _quantize_fake(z, c, "straight_through", deterministic))
    expected = reference.quantize(rows_of(z), c)
    assert torch.equal(rows_of(real[0]), expected[0])
    for found, truth in zip(real[1:], expected[1:], strict=True):
        torch.testing.assert_close(found.reshape(truth.shape), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_error(layout: str, dtype: torch.dtype, device: str) -> None:
    z, c = laid_out(layout, dtype, device)
    index = torch.randint(37, (z.shape[0], *z.shape[2:]), generator=torch.Generator().manual_seed(1)).to(device)
    found = quantizer.code_error(z, c.T.contiguous().T, index)
    alike((found,), (_code_error_fake(z, c, index),))
    truth = reference.code_error(rows_of(z).double(), c.double(), index.flatten())
    # 20 squares of differences, each rounded three times: differences of operands that are exact.
    limit = 4 * 20 * torch.finfo(found.dtype).eps * truth
    assert ((found.flatten().double() - truth).abs() <= limit).all()
    assert torch.equal(_code_error_cuda(z, c, index), found)


def test_a_nan_reaches_its_own_error_alone(device: str) -> None:
    z, c = laid_out("rows", torch.float32, device)
    index = torch.zeros(60, dtype=torch.int64, device=device)
    clean = quantizer.code_error(z, c, index)
    z[7, 19] = torch.nan
    found = quantizer.code_error(z, c, index)
    assert found[7].isnan()
    kept = torch.arange(60, device=device) != 7
    assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_index_outside_the_codebook_is_not_followed(layout: str, device: str) -> None:
    """Its own error is NaN; nothing is read for it, and its neighbours' errors and gradients stay."""
    z, c = laid_out(layout, torch.float32, device)
    # The codebook lies between NaNs, which a wild read would meet.
    around = torch.full((3 * len(c), c.shape[1]), torch.nan, device=device)
    around[len(c) : 2 * len(c)] = c
    inner = around[len(c) : 2 * len(c)]
    index = torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=device)
    clean = quantizer.code_error(z, inner, index)
    beyond = torch.tensor([-1, len(c), -(1 << 62), (1 << 62), len(c) + 1], device=device)
    beyond = beyond[: index.numel()]
    index.view(-1)[: len(beyond)] = beyond
    found = quantizer.code_error(z, inner, index)
    assert found.flatten()[: len(beyond)].isnan().all()
    assert torch.equal(found.flatten()[len(beyond) :], clean.flatten()[len(beyond) :])
    grad_z, grad_codes = _quantize_backward_cuda(
        None, torch.ones_like(found), z, inner, index, "straight_through", True, True
    )
    clipped = _quantize_backward_cuda(
        None, torch.ones_like(found), z, inner, index.clamp(0, len(c) - 1), "straight_through", True, True
    )
    assert torch.equal(grad_z, clipped[0])
    assert torch.equal(grad_codes, clipped[1])


def test_every_launch_is_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """cuda:1 while cuda:0 is the current device, as far as one device can tell: the guard is entered for z."""
    inside: list[torch.device] = []
    launched: list[str] = []

    @contextlib.contextmanager
    def guard(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor.device)
        try:
            yield
        finally:
            inside.pop()

    class Watched:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            assert inside, f"{self.name} is launched on the current device"
            assert inside[-1] == z.device
            launched.append(self.name)
            return self.kernel[grid]

    kernels = []
    for module in (search, quantizer):
        monkeypatch.setattr(module, "on_device", guard)
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                kernels.append(name)
                monkeypatch.setattr(module, name, Watched(name, getattr(module, name)))
    z, c = laid_out("map", torch.float32, device)
    index = search.nearest_code(z, c)
    for deterministic in (False, True):
        quantizer.quantize(z, c, deterministic)
    quantizer.code_error(z, c, index)
    assert set(launched) == set(kernels)
