import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from movae_fast import _csrc, ops
from movae_fast.ops.extension import forced_isa

ISAS = _csrc.nearest_code_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def search(z: Tensor, codebook: Tensor, isa: str = "") -> Tensor:
    """Search with one instruction set, "" for the fastest."""
    with forced_isa(isa):
        return ops.nearest_code(z, codebook)


def wrong(z: Tensor, codebook: Tensor, index: Tensor) -> int:
    """Rows whose index is not float64's. Two scores tie if float64 itself cannot tell them apart: the bound
    is that of a sum of D + 2 terms, 2^29 times finer than float32's."""
    z, codebook = z.double(), codebook.double()
    half_norm = codebook.square().sum(1) / 2
    length, longest = z.norm(dim=1), codebook.norm(dim=1).max()
    total = 0
    for rows, indices, norm in zip(z.split(1024), index.split(1024), length.split(1024), strict=True):
        scores = half_norm - rows @ codebook.T
        excess = scores.gather(1, indices[:, None])[:, 0] - scores.min(1).values
        tie = 4 * (z.shape[1] + 2) * 2.0**-53 * (norm * longest + longest**2 / 2)
        total += int((excess > tie).sum())
    return total


def families(scale: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The families that break others' lookups, about 500 rows each times `scale`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for D in (1, 3, 16, 63, 64, 65, 256):
        n = int(500 * scale)
        yield f"gaussian D={D}", normal(n, D), normal(512, D)
        yield f"denormal D={D}", normal(n, D) * 1e-40, normal(512, D) * 1e-40
        yield f"1e30 D={D}", normal(n, D) * 1e30, normal(512, D) * 1e30
        yield f"duplicated D={D}", normal(n, D), normal(100, D).repeat(5, 1)
    for K, n in ((512, 500), (8192, 250), (65536, 60)):
        codebook = (torch.rand(K, 64, generator=generator) * 2 - 1) / K
        yield f"U(-1/K, 1/K) K={K}", normal(int(n * scale), 64), codebook
    # bfloat16 cannot tell these apart: the path that screens again in float32.
    yield "crowded", normal(int(200 * scale), 64) * 0.01 + 1, normal(1000, 64) * 0.01 + 1


@pytest.mark.parametrize("isa", ISAS)
def test_index_is_that_of_float64_brute_force(isa: str) -> None:
    for name, z, codebook in families(1):
        assert wrong(z, codebook, search(z, codebook, isa=isa)) == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_index_is_that_of_float64_brute_force_on_a_million_rows(isa: str) -> None:
    rows = 0
    for name, z, codebook in families(68):
        rows += len(z)
        assert wrong(z, codebook, search(z, codebook, isa=isa)) == 0, name
    assert rows >= 10**6


def test_the_judge_sees_one_wrong_row() -> None:
    z, codebook = torch.randn(50, 8), torch.randn(20, 8)
    index = search(z, codebook)
    index[17] = (index[17] + 1) % 20
    assert wrong(z, codebook, index) == 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, str, int]:
    seed = draw(st.integers(0, 2**32 - 1))
    N, K, D = draw(st.integers(0, 200)), draw(st.integers(1, 300)), draw(st.integers(1, 130))
    dtype = draw(st.sampled_from(DTYPES))
    reach = {torch.float16: 4, torch.float64: 140}.get(dtype, 37)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(N, D, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-reach, reach))
    codebook = torch.randn(K, D, generator=generator, dtype=torch.float64) * 10.0 ** draw(
        st.integers(-reach, reach)
    )
    if draw(st.booleans()):  # an offset: crowded codes
        codebook += codebook.abs().max() * draw(st.sampled_from([1.0, 30.0, 1000.0]))
    if draw(st.booleans()):  # scales that differ from row to row
        z *= 10.0 ** torch.randint(-6, 6, (N, 1), generator=generator)
    if draw(st.booleans()):  # a lattice: exact ties
        z, codebook = z.sign(), codebook.sign()
    limit = torch.finfo(dtype).max / 2 if dtype != torch.float64 else 1e150
    z, codebook = z.clamp(-limit, limit), codebook.clamp(-limit, limit)
    return z.to(dtype), codebook.to(dtype), draw(st.sampled_from(ISAS)), draw(st.integers(1, 3))


def check(problem: tuple[Tensor, Tensor, str, int]) -> None:
    z, codebook, isa, threads = problem
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        index = search(z, codebook, isa=isa)
    finally:
        torch.set_num_threads(before)
    assert index.shape == (len(z),)
    assert ((index >= 0) & (index < len(codebook))).all()
    assert wrong(z, codebook, index) == 0


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
test_any_problem = settings(max_examples=100, **RELAXED)(given(problems())(check))
test_any_problem_2000_draws = pytest.mark.slow(settings(max_examples=2000, **RELAXED)(given(problems())(check)))


@pytest.mark.parametrize("isa", ISAS)
def test_lowest_index_on_a_tie(isa: str) -> None:
    z, base = torch.randn(300, 24), torch.randn(130, 24)
    index = search(z, base.repeat(9, 1), isa=isa)
    torch.testing.assert_close(index, search(z, base, isa=isa))
    assert (search(z, torch.zeros(200, 24), isa=isa) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("K", [1, 5, 64, 65, 2048, 2049, 5000])
def test_every_code_finds_itself(isa: str, K: int) -> None:
    codebook = torch.randn(K, 17)
    torch.testing.assert_close(search(codebook, codebook, isa=isa), torch.arange(K))


@pytest.mark.parametrize("isa", ISAS)
def test_codebook_of_several_blocks(isa: str) -> None:
    codebook = torch.randn(5000, 1024)  # 20 MB: more than is packed at a time
    rows = torch.tensor([0, 1, 2047, 2048, 3071, 3072, 4095, 4096, 4999])
    z = codebook[rows] + 0.1 * torch.randn(len(rows), 1024)
    torch.testing.assert_close(search(z, codebook, isa=isa), rows)
    doubled = torch.cat([codebook[:2500], codebook[:2500]])  # the copy lies in a later block
    torch.testing.assert_close(search(codebook[2400:2410], doubled, isa=isa), torch.arange(2400, 2410))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_half_and_double_inputs(isa: str, dtype: torch.dtype) -> None:
    z, codebook = torch.randn(500, 37).to(dtype), torch.randn(300, 37).to(dtype)
    assert wrong(z, codebook, search(z, codebook, isa=isa)) == 0
    tiny = torch.finfo(dtype).smallest_normal / 8  # subnormals of the dtype
    z, codebook = (z.double() * tiny).to(dtype), (codebook.double() * tiny).to(dtype)
    if dtype != torch.float64:  # the judge's squares would underflow
        assert wrong(z, codebook, search(z, codebook, isa=isa)) == 0
    else:
        torch.testing.assert_close(
            search(z, codebook, isa=isa), search(z * 2.0**900, codebook * 2.0**900, isa=isa)
        )


def test_float64_beyond_the_range_of_squares() -> None:
    z, codebook = torch.randn(200, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    expected = search(z, codebook)
    for scale in (2.0**1000, 2.0**-1000):
        torch.testing.assert_close(search(z * scale, codebook * scale), expected)
    # Both codes round to the float32 number 1.
    near = torch.tensor([[1.0], [1.0 + 5e-8]], dtype=torch.float64)
    at = torch.tensor([[1.0 + 1e-8], [1.0 + 4e-8]], dtype=torch.float64)
    assert search(at, near).tolist() == [0, 1]


@pytest.mark.parametrize("isa", ISAS)
def test_scales_of_z_and_codebook_may_differ(isa: str) -> None:
    z, codebook = torch.randn(100, 12), torch.randn(70, 12)
    for of_z in (1e-38, 1e-20, 1.0, 1e20, 1e37):
        for of_codes in (1e-38, 1e-20, 1.0, 1e20, 1e37):
            a, b = z * of_z, codebook * of_codes
            assert wrong(a, b, search(a, b, isa=isa)) == 0, (of_z, of_codes)
    mixed = z * 10.0 ** torch.randint(-30, 30, (100, 1))
    assert wrong(mixed, codebook, search(mixed, codebook, isa=isa)) == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_gets_index_0_and_touches_no_other(isa: str, bad: float) -> None:
    z, codebook = torch.randn(200, 33), torch.randn(90, 33)
    expected = search(z, codebook, isa=isa)
    spoiled = z.clone()
    spoiled[[0, 57, 199], [0, 32, 16]] = bad
    expected[[0, 57, 199]] = 0
    torch.testing.assert_close(search(spoiled, codebook, isa=isa), expected)
    assert (search(torch.full((3, 33), bad), codebook, isa=isa) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_code_is_never_chosen(isa: str) -> None:
    z, codebook = torch.randn(200, 10), torch.randn(90, 10)
    spoiled = codebook.clone()
    spoiled[::3, 4] = float("nan")
    spoiled[1, 2] = float("inf")
    good = torch.tensor([k for k in range(90) if k % 3 and k != 1])
    torch.testing.assert_close(search(z, spoiled, isa=isa), good[search(z, codebook[good], isa=isa)])
    assert (search(z, torch.full((5, 10), float("nan")), isa=isa) == 0).all()


def layouts() -> dict[str, Tensor]:
    image = torch.randn(3, 10, 6, 7)
    return {
        "channel-first": image,
        "channels-last": image.to(memory_format=torch.channels_last),
        "sliced batch": torch.randn(6, 10, 6, 7)[::2],
        "sliced channels": torch.randn(3, 20, 6, 7)[:, ::2],
        "cropped": torch.randn(3, 10, 9, 9)[:, :, 1:7, 2:9],
        "sequence": torch.randn(3, 10, 41),
        "volume": torch.randn(2, 10, 3, 4, 5),
        "one pixel": torch.randn(5, 10, 1, 1),
        "one column": torch.randn(5, 10, 8, 1),
        "expanded": torch.randn(1, 10, 1, 7).expand(3, 10, 6, 7),
        "transposed rows": torch.randn(10, 50).T,
        "sliced rows": torch.randn(100, 30)[::3, ::3],
        "no rows": torch.randn(0, 10),
        "no images": torch.randn(0, 10, 4, 4),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", DTYPES)
def test_z_is_read_where_it_lies(layout: str, dtype: torch.dtype) -> None:
    z, codebook = layouts()[layout].to(dtype), torch.randn(40, 10).to(dtype)
    index = ops.nearest_code(z, codebook)
    assert index.shape == (z.shape[0], *z.shape[2:])
    rows = z.movedim(1, -1).reshape(-1, 10).contiguous()
    torch.testing.assert_close(index.flatten(), search(rows, codebook))


def test_offsets_past_two_to_the_31() -> None:
    stride, rows = 2**26, 36
    memory = torch.empty(stride * rows, dtype=torch.bfloat16)  # only the pages touched are ever backed
    z = memory.as_strided((rows, 5), (stride, 1))
    z.copy_(torch.randn(rows, 5))
    codebook = torch.randn(20, 5).bfloat16()
    torch.testing.assert_close(ops.nearest_code(z, codebook), search(z.contiguous(), codebook))


def test_screening_alone_is_close() -> None:
    z, codebook = torch.randn(4000, 64), torch.randn(512, 64)
    exact, screened = search(z, codebook), ops.nearest_code(z, codebook, exact=False)
    distance = (z - codebook[screened]).norm(dim=1) / (z - codebook[exact]).norm(dim=1)
    # |d score| <= 2 (2u + u^2) |z| |c| with bfloat16's u = 2^-9, against a squared distance of about 2 D.
    assert distance.max() < 1.02
    assert (exact == screened).float().mean() > 0.98


def test_mixed_dtypes_are_promoted() -> None:
    z, codebook = torch.randn(50, 6).bfloat16(), torch.randn(9, 6)
    torch.testing.assert_close(ops.nearest_code(z, codebook), search(z.float(), codebook))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ops.nearest_code(z, codebook), search(z.float(), codebook))


@pytest.mark.parametrize(
    ("z", "codebook", "error", "says"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 2), ValueError, r"\[4, 3\].*\[5, 2\]"),
        (torch.zeros(4), torch.zeros(5, 4), ValueError, r"\[4\].*\[5, 4\]"),
        (torch.zeros(4, 3), torch.zeros(3), ValueError, r"\[4, 3\].*\[3\]"),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, r"empty.*\[0, 3\]"),
        (torch.zeros(4, 0), torch.zeros(5, 0), ValueError, "empty"),
        (
            torch.zeros(4, 3, dtype=torch.int64),
            torch.zeros(5, 3),
            TypeError,
            r"\[4, 3\] int64.*\[5, 3\] float32",
        ),
        (torch.zeros(4, 3), torch.zeros(5, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(4, 3), torch.zeros(5, 3, device="meta"), ValueError, "cpu.*meta"),
    ],
)
def test_bad_operands_are_shown(z: Tensor, codebook: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ops.nearest_code(z, codebook)


def test_opcheck() -> None:
    op = torch.ops.movae.nearest_code.default
    torch.library.opcheck(op, (torch.randn(20, 5), torch.randn(7, 5), True))
    torch.library.opcheck(op, (torch.randn(2, 5, 3, 3), torch.randn(7, 5), False))


def test_compiles_whole() -> None:
    def lookup(z: Tensor, codebook: Tensor) -> Tensor:
        return codebook[ops.nearest_code(z * 2, codebook)].sum(1)

    z, codebook = torch.randn(30, 8), torch.randn(10, 8)
    torch.testing.assert_close(torch.compile(lookup, fullgraph=True)(z, codebook), lookup(z, codebook))


def test_vmap_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="fold the mapped dimension"):
        torch.vmap(ops.nearest_code, in_dims=(0, None))(torch.randn(3, 4, 5), torch.randn(6, 5))


def test_a_path_can_be_forced() -> None:
    assert "portable" in ISAS
    asked = "from movae_fast import _csrc; print(_csrc.nearest_code_isa())"
    found = subprocess.run(
        [sys.executable, "-c", asked],
        env={**os.environ, "MOVAE_CPU_ISA": "portable"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "portable"
    with pytest.raises(ValueError, match=r"'sse9'.*portable"):
        search(torch.randn(2, 3), torch.randn(4, 3), isa="sse9")


def test_the_number_of_threads_changes_nothing() -> None:
    z, codebook = torch.randn(1000, 20), torch.randn(100, 20)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(search(z, codebook))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_finds_what_the_cpu_finds() -> None:
    for name, z, codebook in families(1):
        index = ops.nearest_code(z.cuda(), codebook.cuda()).cpu()
        chosen, best = codebook[index].double(), codebook[search(z, codebook)].double()
        excess = (z - chosen).square().sum(1) - (z - best).square().sum(1)
        # What float32 can tell: the rounding of a score, a sum of D + 2 terms.
        scale = (
            z.double().norm(dim=1) * codebook.double().norm(dim=1).max()
            + codebook.double().square().sum(1).max()
        )
        assert (excess <= 4 * (z.shape[1] + 2) * 2.0**-24 * scale).all(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", ["channel-first", "channels-last", "sliced rows", "no rows"])
def test_cuda_reads_z_where_it_lies(layout: str) -> None:
    z, codebook = layouts()[layout], torch.randn(40, 10)
    torch.testing.assert_close(ops.nearest_code(z.cuda(), codebook.cuda()).cpu(), ops.nearest_code(z, codebook))
