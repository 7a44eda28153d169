"""Search and quantisation against brute force in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.kernels import nearest_code as search
from movae_fast.kernels import quantize as quantizer
from movae_fast.ops.nearest_code import _nearest_code_cuda
from movae_fast.ops.quantize import _quantize_cuda

FAMILIES = ["gaussian", "uniform", "duplicates", "subnormal", "1e30", "1e-30", "outlier", "midpoints"]


def family(name: str, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + K + D)
    z, c = torch.randn(N, D, generator=generator), torch.randn(K, D, generator=generator)
    if name == "uniform":
        c = (torch.rand(K, D, generator=generator) * 2 - 1) / K
    elif name == "duplicates":
        c[K // 2 :] = c[: K - K // 2].clone()
    elif name == "outlier":  # one code so long that a bound made of it would keep every other
        c[K // 3] *= 1e4
    elif name == "midpoints":  # beside the middle of two bfloat16 numbers: every error the bound's own size
        aside = (1 + torch.rand(N + K, 1, generator=generator)) * 2.0**-20
        aside[N + 1 :: 2] *= -1
        z, c = (1 + 2.0**-8 - aside).expand(-1, D).split([N, K])
        z, c = z.contiguous(), c.contiguous()
    elif name != "gaussian":
        scale = {"subnormal": 1e-40, "1e30": 1e30, "1e-30": 1e-30}[name]
        z, c = z * scale, c * scale
    return z, c


def check(z: Tensor, c: Tensor, index: Tensor) -> None:
    """The best float64 score, up to float64's rounding, and the first code that has it."""
    z, c = z.double(), c.double()
    products, half = z @ c.T, c.square().sum(1) / 2
    score = products - half
    slack = 4 * z.shape[1] * 2.0**-53 * (z.norm(dim=1) * c.norm(dim=1).max() + half.max())
    chosen = score.gather(1, index[:, None])[:, 0]
    assert (chosen >= score.max(1).values - slack).all()
    same = (c[:, None] == c[None]).all(2)  # [K, K]
    assert torch.equal(index, same[index].int().argmax(1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("N", "K", "D"),
    [
        (40, 90, 64),
        (40, 90, 1),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in [
                (70, 65, 3),
                (70, 130, 64),
                (40, 200, 16),
                (40, 90, 63),
                (140, 300, 65),
                (20, 130, 256),
                (10, 2000, 64),
            ]
        ),
    ],
)
def test_exact_float32(name: str, N: int, K: int, D: int, device: str) -> None:
    z, c = (t.to(device) for t in family(name, N, K, D))
    check(z, c, search.nearest_code(z, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gaussian", "uniform", "duplicates"])
@pytest.mark.parametrize("D", [1, *(pytest.param(D, marks=pytest.mark.slow) for D in (16, 63, 65))])
def test_exact_in_every_dtype(dtype: torch.dtype, name: str, D: int, device: str) -> None:
    z, c = (t.to(device, dtype) for t in family(name, 50, 90, D))
    check(z, c, search.nearest_code(z, c))


@pytest.mark.parametrize("name", ["gaussian", "uniform", "outlier"])
def test_exact_by_tf32(name: str, device: str) -> None:
    z, c = (t.to(device) for t in family(name, 66, 130, 32))
    check(z, c, search.nearest_code(z, c, precision="tf32"))


def test_many_lanes_and_one_overflow_to_the_list(device: str) -> None:
    """Codes that differ by less than bfloat16 sees: every lane is a candidate, and only the list can decide."""
    generator = torch.Generator().manual_seed(0)
    c = (1 + 1e-5 * torch.randn(300, 16, generator=generator)).to(device)
    z = torch.randn(70, 16, generator=generator).to(device)
    check(z, c, search.nearest_code(z, c))


@pytest.mark.parametrize("config", search.candidates(40, True, 80) + search.candidates(40, True, 100))
def test_every_tile_gives_the_same(config: search.Config, device: str) -> None:
    z, c = (t.to(device) for t in family("gaussian", 70, 300, 40))
    check(z, c, search.nearest_code(z, c, config=config))


def exponent(x: np.ndarray) -> np.ndarray:
    """floor(log2 |x|), far below every other for a zero."""
    return np.where(x == 0, -1000, np.frexp(x)[1] - 1)


def cut(x: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """x towards zero to a multiple of 2^unit."""
    return np.ldexp(np.trunc(np.ldexp(x, -unit)), unit)


def as_tensor_cores(a: np.ndarray, b: np.ndarray, acc: np.ndarray, block: int, guard: int) -> np.ndarray:
    """a @ b + acc as measured on tensor cores (Fasi et al. 2021).

    `block` products and the accumulator at a time: aligned to the largest exponent, cut below 2^-(23 + guard)
    of it, added exactly, cut to float32. A product's exponent is the sum of its operands'.
    """
    a, b, acc = a.astype(np.float64), b.astype(np.float64), acc.astype(np.float64)
    for first in range(0, a.shape[1], block):
        left, right = a[:, first : first + block, None], b[None, first : first + block, :]
        largest = (exponent(left) + exponent(right)).max(1)
        unit = np.maximum(largest, exponent(acc)) - 23 - guard
        total = cut(left * right, unit[:, None]).sum(1) + cut(acc, unit)
        acc = cut(total, exponent(total) - 23)
    return acc.astype(np.float32)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch, device: str) -> Callable[[int, int], None]:
    """Compute dots as tensor cores do and, as Triton's compiler does, a dot plus x as a dot that begins as x.

    On a GPU there is nothing to imitate.
    """

    def imitate(block: int, guard: int) -> None:
        if device != "cpu":
            return
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        add = InterpreterBuilder.create_fadd

        def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            out = TensorHandle(as_tensor_cores(a.data, b.data, d.data, block, guard), d.dtype.scalar)
            if not d.data.any():
                out.product = a.data, b.data
            return out

        def create_fadd(self: Any, lhs: Any, rhs: Any) -> Any:
            for product, other in ((lhs, rhs), (rhs, lhs)):
                if hasattr(product, "product"):
                    data = as_tensor_cores(*product.product, other.data, block, guard)
                    return TensorHandle(data, product.dtype.scalar)
            return add(self, lhs, rhs)

        # conftest.py's create_dot turns the operands into what tensor cores read, and calls this to multiply.
        monkeypatch.setitem(InterpreterBuilder.create_dot.__globals__, "_create_dot", dot)
        monkeypatch.setattr(InterpreterBuilder, "create_fadd", create_fadd)

    return imitate


def short_rows(D: int = 64) -> tuple[Tensor, Tensor]:
    """Rows of 1e-6 of the codes' length, whose products lie just below what is cut beside ||c||^2 / 2.

    All codes are equally long. The last has no component against the rows, so it is theirs.
    """
    side = 1 + 2.0**-7
    c = torch.full((40, D), side)
    c[torch.arange(39), torch.arange(39)] = -side
    half = int(np.floor(np.log2(D * side**2 / 2)))
    rows = [torch.full((D,), 0.98 * 2.0 ** (half - 23 - guard) / side) for guard in (0, 1, 2, 3)]
    generator = torch.Generator().manual_seed(0)
    rows += list(rows[1] * (0.5 + torch.rand(60, D, generator=generator)))
    return torch.stack(rows).bfloat16().float(), c


@pytest.mark.parametrize("screen", ["float32", "bfloat16", "tf32"])
@pytest.mark.parametrize(
    ("block", "guard"), [(8, 1), (16, 3), *(pytest.param(n, 2, marks=pytest.mark.slow) for n in (8, 16))]
)
def test_exact_where_tensor_cores_cut(
    block: int, guard: int, screen: str, tensor_cores: Callable[[int, int], None], device: str
) -> None:
    tensor_cores(block, guard)
    dtype, precision = (torch.bfloat16, "bf16") if screen == "bfloat16" else (torch.float32, "bf16")
    if screen == "tf32":
        precision = "tf32"
    z, c = (t.to(device, dtype) for t in short_rows())
    index = search.nearest_code(z, c, precision=precision)
    assert torch.equal(index, torch.full_like(index, 39))
    z, c = (t.to(device, dtype) for t in family("gaussian", 40, 90, 64))
    check(z, c, search.nearest_code(z, c, precision=precision))


def test_screening_alone(device: str) -> None:
    z, c = (t.to(device) for t in family("gaussian", 100, 200, 20))
    rounded = reference.nearest_code(z.bfloat16().float(), c.bfloat16().float())
    agree = search.nearest_code(z, c, exact=False) == rounded
    assert agree.float().mean() > 0.95  # half norms are of the unrounded codes
    z, c = torch.zeros(3, 20, device=device), torch.zeros(9, 20, device=device)
    assert torch.equal(search.nearest_code(z, c, exact=False), torch.zeros(3, dtype=torch.int64, device=device))


def test_channel_first_without_a_copy(device: str) -> None:
    z = torch.randn(2, 20, 5, 7, device=device)
    c = torch.randn(33, 20, device=device)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 20)
    expected = search.nearest_code(rows, c).view(2, 5, 7)
    assert torch.equal(search.nearest_code(z, c), expected)
    assert torch.equal(search.nearest_code(z.contiguous(memory_format=torch.channels_last), c), expected)
    assert torch.equal(search.nearest_code(rows.T.contiguous().T, c), expected.flatten())
    assert torch.equal(search.nearest_code(z.transpose(2, 3), c), expected.transpose(1, 2))


def test_what_is_not_a_number(device: str) -> None:
    z, c = (t.to(device) for t in family("gaussian", 40, 70, 24))
    clean = search.nearest_code(z, c)
    z[3, 0], z[7, 23], z[9] = torch.nan, torch.inf, 0
    c[int(clean[0])] = torch.nan
    index = search.nearest_code(z, c)
    assert index[3] == index[7] == 0
    assert not (index == clean[0]).any() or clean[0] == 0
    kept = (clean != clean[0]) & z.isfinite().all(1) & (z != 0).any(1)
    assert torch.equal(index[kept], clean[kept])
    assert search.nearest_code(z[:0], c).shape == (0,)
    bad = torch.full_like(c, torch.nan)
    assert torch.equal(search.nearest_code(z, bad), torch.zeros(40, dtype=torch.int64, device=device))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channel_first", [False, True])
def test_quantize(deterministic: bool, dtype: torch.dtype, channel_first: bool, device: str) -> None:
    z, c = (t.to(device, dtype) for t in family("gaussian", 60, 37, 20))
    image = z.view(2, 5, 6, 20).permute(0, 3, 1, 2)
    if channel_first:
        image = image.contiguous()
    z_q, index, sq_err, count, code_sum = quantizer.quantize(image, c, deterministic)
    assert z_q.stride() == image.stride()
    rows = z_q.permute(0, 2, 3, 1).reshape(-1, 20)
    expected = reference.quantize(z.double(), c.double())
    assert torch.equal(rows, c[expected[1]])
    assert torch.equal(index.flatten(), expected[1])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(sq_err.flatten().double(), expected[2], rtol=20 * eps, atol=0)
    assert torch.equal(count.double(), expected[3])
    bound = 60 * eps * torch.zeros_like(code_sum).index_add_(0, index.flatten(), z.abs())
    assert ((code_sum.double() - expected[4]).abs() <= bound).all()


def test_ops_launch_these_kernels(device: str) -> None:
    z, c = (t.to(device) for t in family("gaussian", 20, 10, 4))
    assert torch.equal(_nearest_code_cuda(z, c, True), reference.nearest_code(z, c))
    for ours, truth in zip(
        _quantize_cuda(z, c, "straight_through", True), reference.quantize(z, c), strict=True
    ):
        torch.testing.assert_close(ours, truth)
