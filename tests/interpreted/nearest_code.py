"""Search and quantisation against brute force in float64."""

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
