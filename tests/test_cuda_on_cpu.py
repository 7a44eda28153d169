"""csrc/**/*.cu executed on a CPU (tests/cuda_on_cpu): the same answers in any order of threads."""

import ctypes
import os
import shutil
import subprocess
from ctypes import c_double, c_int, c_int64, c_long, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from movae_fast import ops
from movae_fast.ops.extension import DTYPES
from movae_fast.ops.gramian_weights import METHODS
from movae_fast.ops.project_weights import KINDS
from tests.cuda_on_cpu.build import CSRC, build, on_cpu
from tests.jacobians import conflicting

ORDERS = {"ascending": 0, "descending": 1, "random": 2}
AT_ONCE = [1, 2, 3, 4, 5, 8, 9]
LATER = [6, 7, 12, 15, 16, 17, 33, 64]
SIZES = [*AT_ONCE, *(pytest.param(m, marks=pytest.mark.slow) for m in LATER)]
REGULARIZERS = {"trace": (1e-4, 1e-4), "diagonal": (0.0, 1e-6)}  # with their norm_eps and reg_eps

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = ctypes.CDLL(str(build(tmp_path_factory.mktemp("emulated"))))
    for name in ("projection", "upgrad", "weightings"):
        getattr(library, f"scratch_of_{name}").restype = c_int64
    library.set_most_bytes.argtypes = [c_long]
    array, number = c_void_p, c_double
    library.project.argtypes = [array, c_int, array, c_int, c_int, c_int, number, number, array, array, array]
    library.upgrad.argtypes = [array, c_int, c_int, c_int64, c_int64, array, c_int, c_int, number, number]
    library.upgrad.argtypes += [array] * 4
    library.weigh.argtypes = [c_int, c_int, array, array, array, number, number, c_int64, array, array]
    return library


def empty(*shape: int) -> Tensor:
    """Memory as a device gives it: not zero."""
    return torch.full(shape, torch.nan, dtype=torch.float64)


def project(cuda: Any, G: Tensor, given: Tensor, kind: str, regularizer: str) -> tuple[Tensor, int]:
    m, given = len(G), given.double().contiguous()
    rows = given.numel() // m
    norm_eps, reg_eps = REGULARIZERS[regularizer]
    out, status = torch.full_like(given, torch.nan), torch.full((), 77, dtype=torch.int32)
    scratch = empty(cuda.scratch_of_projection(m, m if kind == "sum" else rows))
    by_diagonal = regularizer == "diagonal"
    assert not cuda.project(
        G.data_ptr(), m, given.data_ptr(), rows, KINDS.index(kind), by_diagonal, norm_eps, reg_eps,
        out.data_ptr(), status.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return out, int(status)


def upgrad(cuda: Any, J: Tensor, pref: Tensor, mode: str, regularizer: str) -> tuple[Tensor, Tensor, int]:
    m, columns = J.shape
    norm_eps, reg_eps = REGULARIZERS[regularizer]
    weights, gramian, status = empty(m), empty(m, m), torch.full((), 77, dtype=torch.int32)
    scratch, by_diagonal = empty(cuda.scratch_of_upgrad(m)), regularizer == "diagonal"
    assert not cuda.upgrad(
        J.data_ptr(), DTYPES[J.dtype], m, columns, J.stride(0), pref.data_ptr(), mode == "upgrad", by_diagonal,
        norm_eps, reg_eps, weights.data_ptr(), gramian.data_ptr(), status.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return weights, gramian, int(status)


def weigh(cuda: Any, G: Tensor, method: str, order: Tensor | None) -> Tensor:
    m = len(G)
    out, scratch = empty(m), empty(cuda.scratch_of_weightings(m))
    a, b = (0.5, 1e-4) if method == "cagrad" else (1e-3, 0.0)
    met = 0 if order is None else order.data_ptr()
    assert not cuda.weigh(
        METHODS.index(method), m, G.data_ptr(), 0, met, a, b, 100, out.data_ptr(), scratch.data_ptr()
    )
    return out


def in_every_order(cuda: Any, compute: Any) -> Any:
    """What `compute` gives, the same bits whatever the order of blocks and threads."""
    found = {}
    for name, number in ORDERS.items():
        cuda.set_order(number)
        found[name] = compute()
    cuda.set_order(0)
    for name in ORDERS:
        for one, other in zip(found[name], found["ascending"], strict=True):
            same = one == other
            if isinstance(one, Tensor):
                same = torch.equal(one.view(torch.int64), other.view(torch.int64))
            assert same, f"{name} order: {one} in place of {other}"
    return found["ascending"]


def jacobian(m: int) -> Tensor:
    J = conflicting(m, 900 if m < 9 else 300, torch.float32)
    J[0] *= 1e-2  # far shorter than the longest
    return J


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("mode", ["upgrad", "dualproj"])
@pytest.mark.parametrize("m", SIZES)
def test_from_rows_to_weights(cuda: Any, m: int, mode: str, regularizer: str) -> None:
    J, pref = jacobian(m), torch.full((m,), 1 / m, dtype=torch.float64)
    weights, gramian, status = in_every_order(cuda, lambda: upgrad(cuda, J, pref, mode, regularizer))
    norm_eps, reg_eps = REGULARIZERS[regularizer]
    options: dict[str, Any] = {"norm_eps": norm_eps, "reg_eps": reg_eps, "regularizer": regularizer}
    expected = ops.upgrad_weights(J, mode=mode, **options)  # type: ignore[arg-type]
    assert status == expected[2] == 0
    torch.testing.assert_close(gramian, expected[1], rtol=1e-12, atol=1e-12 * float(gramian.max()))
    # Gramians that differ by the order of summation, through a problem of condition 1 / reg_eps.
    torch.testing.assert_close(weights, expected[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("m", SIZES)
def test_projections_of_one_gramian(cuda: Any, m: int, regularizer: str) -> None:
    G, u = ops.gramian(jacobian(m)), torch.randn(6, m, dtype=torch.float64)
    norm_eps, reg_eps = REGULARIZERS[regularizer]
    options: dict[str, Any] = {"norm_eps": norm_eps, "reg_eps": reg_eps, "regularizer": regularizer}
    pref = torch.rand(m, dtype=torch.float64)
    kinds = {
        "sum": (pref, lambda: ops.project_weights(G, pref, **options)),
        "rows": (u, lambda: ops.project_rows(u, G, **options)),
    }
    if regularizer == "diagonal":
        slopes = G @ u[0]
        kinds["multipliers"] = (slopes, lambda: ops.step_multipliers(G, slopes, reg_eps=reg_eps))
    for kind, (given, on_host) in kinds.items():
        found, status = in_every_order(
            cuda, lambda given=given, kind=kind: project(cuda, G, given, kind, regularizer)
        )
        expected = on_host()[0]
        assert status == 0, kind
        # One solver, whose refined answer does not depend on how the support was found.
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13 * size, msg=kind)


@pytest.mark.parametrize("m", SIZES)
def test_weightings(cuda: Any, m: int) -> None:
    G, order = ops.gramian(conflicting(m, 300)), torch.rand(m, m).argsort(1)
    for method in METHODS:
        met = order if method == "pcgrad" else None
        (found,) = in_every_order(cuda, lambda method=method, met=met: (weigh(cuda, G, method, met),))
        expected = ops.gramian_weights(G, method, order=met)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=f"{method} m {m}")


@pytest.mark.parametrize("m", [3, 9, pytest.param(20, marks=pytest.mark.slow)])
def test_what_is_not_a_number_and_other_rows(cuda: Any, m: int) -> None:
    pref = torch.full((m,), 1 / m, dtype=torch.float64)
    J = jacobian(m)
    J[1, 5] = torch.nan
    weights, _, status = in_every_order(cuda, lambda: upgrad(cuda, J, pref, "upgrad", "diagonal"))
    assert weights.isnan().all()
    assert status == -1
    for rows in (
        jacobian(m).double(),
        jacobian(m).bfloat16(),
        jacobian(m).half(),
        torch.randn(m, 1),
        torch.randn(m, 33),
        torch.randn(m, 200)[:, :50],
    ):
        gramian = upgrad(cuda, rows, pref, "upgrad", "trace")[1]
        torch.testing.assert_close(gramian, ops.gramian(rows), rtol=1e-12, atol=1e-12 * float(gramian.max()))


def test_shared_memory_that_the_gpu_does_not_have_is_an_error(cuda: Any, capfd: pytest.CaptureFixture) -> None:
    """The emulation's own limits: a launch that asks for more than a block may have fails, and says so."""
    G = torch.eye(64, dtype=torch.float64)
    cuda.set_most_bytes(32 * 1024)
    try:
        with pytest.raises(AssertionError):
            project(cuda, G, torch.ones(64), "sum", "trace")
    finally:
        cuda.set_most_bytes(99 * 1024)
    assert project(cuda, G, torch.ones(64), "sum", "trace")[1] == 0
    assert "CUDA: invalid value" in capfd.readouterr().err


def test_a_launch_that_the_emulation_cannot_read_is_an_error() -> None:
    source = "k<<<g(1, 2), 32, n, s>>>(a, b);"
    assert on_cpu(source) == "emulated::launch(g(1, 2), 32, n, [=]() mutable { k(a, b); });"
    for other in ("int x;", source + "extern __shared__ float f[];"):
        with pytest.raises(ValueError, match="does not know"):
            on_cpu(other)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_every_entry_point_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    """In buffers of exactly the size that Python gives; for the thread sanitizer a fiber is a thread."""
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    driver = build(tmp_path, *flags, driver=True)
    sizes = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64] if sanitizer != "thread" else [2, 4, 5, 9, 17]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([str(driver), *map(str, sizes)], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert f"{17 * len(sizes)} calls, 0 failures" in run.stdout


STORED = "            if ((threadIdx.x & 31) == 0) across[threadIdx.x >> 5] = total;\n"
DEFECTS = {
    "a missing barrier": ("thread", STORED + "            __syncthreads();\n", STORED, "data race"),
    "scratch for one row": (
        "address",
        "return static_cast<int64_t>(m) * rows + 1;",
        "return static_cast<int64_t>(m) + 1;",
        "heap-buffer-overflow",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_sanitizers_see_a_defect_that_is_put_in(defect: str, tmp_path: Path) -> None:
    sanitizer, right, wrong, complaint = DEFECTS[defect]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = (csrc / "projection/upgrad.cu").read_text()
    assert right in source, "upgrad.cu has changed: put the defect in another way"
    (csrc / "projection/upgrad.cu").write_text(source.replace(right, wrong))
    driver = build(tmp_path, f"-fsanitize={sanitizer}", driver=True, csrc=csrc)
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([str(driver), "4", "9"], capture_output=True, text=True, env=env, check=False)
    assert run.returncode != 0
    assert complaint in run.stderr
