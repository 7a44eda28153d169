"""Every launcher, on the shapes that users have and on degenerate ones: what it would launch is compiled, not
run.

Triton makes another kernel of the same source for a size or a stride of 1, for one that is a multiple of 16 and
for one beyond 32 bits. The launchers get tensors of a CPU here, and a driver that knows what a GPU of that kind
is but has none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from movae_fast.kernels import combine, gramian, nearest_code, project_weights, quantize, tc_terms  # noqa: E402
from tests.test_kernels_aot import SHARED_OF_ALL, spilled  # noqa: E402

SHARED = SHARED_OF_ALL | {75: 64 * 1024}
FLOATS = (torch.float32, torch.bfloat16, torch.float64)
Compiled = list[tuple[str, Any]]  # what was compiled, with the kernel's name


class NoGpu:
    """What Triton asks of its driver before a launch; of a device that only compiles."""

    launcher_cls = None

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # each has a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@pytest.fixture
def compiled_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[int, Callable[[], Any]], Compiled]]:
    """Return a function that calls a launcher for a capability and returns the kernels it compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernels: Compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        sizes = (*grid, 1, 1)[:3]
        assert 1 <= sizes[0] < 2**31, grid
        assert all(1 <= size < 2**16 for size in sizes[1:]), grid
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)

    def launch(capability: int, launcher: Callable[[], Any]) -> Compiled:
        driver.set_active(NoGpu(capability))
        monkeypatch.setattr(nearest_code, "capability", lambda device: capability)
        kernels.clear()
        launcher()
        return list(kernels)

    before = driver._active
    yield launch
    driver._active = before


def searches(shapes: list[tuple[int, int, int]], maps: list[tuple[int, ...]], floats: Any) -> Iterator[Any]:
    for N, K, D in shapes:
        for dtype in floats:
            z, codebook = torch.zeros(N, D, dtype=dtype), torch.zeros(K, D, dtype=dtype)
            for deterministic in (False, True):
                name = f"quantize {N} {K} {D} {dtype} deterministic={deterministic}"
                yield name, lambda z=z, c=codebook, d=deterministic: quantize.quantize(z, c, d)
            index = torch.zeros(N, dtype=torch.int64)
            yield (
                f"code_error {N} {K} {D} {dtype}",
                lambda z=z, c=codebook, i=index: quantize.code_error(z, c, i),
            )
        for how in ({"exact": False}, {"precision": "tf32"}):
            z, codebook = torch.zeros(N, D), torch.zeros(K, D)
            name = f"nearest_code {N} {K} {D} {how}"
            yield name, lambda z=z, c=codebook, how=how: nearest_code.nearest_code(z, c, **how)
    for shape in maps:
        z, codebook = torch.zeros(shape), torch.zeros(5, shape[1])
        for name, view in (("", z), ("channels last ", z.contiguous(memory_format=torch.channels_last))):
            yield f"quantize {name}{shape}", lambda z=view, c=codebook: quantize.quantize(z, c)


def jacobians(shapes: list[tuple[int, int]], floats: Any) -> Iterator[Any]:
    for m, P in shapes:
        pref = torch.ones(m, dtype=torch.float64)
        for dtype in floats:
            rows = torch.zeros(m, P, dtype=dtype)
            for name, J in (("", rows), ("strided ", torch.zeros(m, P + 3, dtype=dtype)[:, :P])):
                yield f"gramian {name}{m} {P} {dtype}", lambda J=J: gramian.gramian(J)
                yield f"combine {name}{m} {P} {dtype}", lambda J=J, w=pref: combine.combine(J, w)
            for diagonal in (False, True):
                name = f"upgrad {m} {P} {dtype} diagonal={diagonal}"
                yield (
                    name,
                    lambda J=rows, u=pref, d=diagonal: project_weights.upgrad(J, u, 1e-4, 1e-4, "sum", d),
                )
        square, wanted = torch.zeros(m, m, dtype=torch.float64), torch.zeros(1, m, dtype=torch.float64)
        for mode, given in (("sum", pref), ("rows", wanted), ("multipliers", wanted)):
            yield (
                f"project {m} {mode}",
                lambda G=square, u=given, mode=mode: project_weights.project(G, u, 0.0, 1e-6, mode, True),
            )


def correlations(shapes: list[tuple[int, int]], sizes: Any, floats: Any) -> Iterator[Any]:
    def both(inputs: list[torch.Tensor], n_data: int, stratified: bool) -> None:
        q, product, top, total = tc_terms.tc_terms(*inputs, n_data, stratified)
        tc_terms.tc_terms_backward(q, product, *inputs, top, total, n_data, stratified)

    for (B, D), n_data, dtype in ((s, n, d) for s in shapes for n in sizes for d in floats):
        inputs = [torch.zeros(B, D, dtype=dtype) for _ in range(3)]
        for stratified in (False, True):
            if not stratified or 2 <= B <= n_data:
                name = f"tc_terms {B} {D} {dtype} of {n_data} stratified={stratified}"
                yield name, lambda i=inputs, n=n_data, s=stratified: both(i, n, s)


def check(launches: Any, capability: int, compiled_for: Any, folder: Path) -> None:
    """Compile all launches; none may ask for more shared memory than there is, or spill."""
    complaints, checked = [], set()
    for name, launcher in launches:
        try:
            kernels = compiled_for(capability, launcher)
        except Exception as error:  # every launch that fails is named
            complaints.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        assert kernels, name
        for kernel_name, kernel in kernels:
            if kernel.hash in checked:
                continue
            checked.add(kernel.hash)
            if kernel.metadata.shared > SHARED[capability]:
                complaints.append(f"{name}: {kernel_name}: {kernel.metadata.shared} bytes of shared memory")
            # A projection of more than 32 rows takes all registers; a few indices beyond those do no harm.
            allowed = 128 if kernel_name == "_project_kernel" else 0
            if (lost := spilled(kernel, capability, folder)) > allowed:
                complaints.append(f"{name}: {kernel_name}: {lost} bytes spilled")
    assert not complaints, f"sm_{capability}:\n" + "\n".join(complaints)
    print(f"sm_{capability}: {len(checked)} kernels compiled")


def test_sizes_and_strides_of_one(compiled_for: Any, tmp_path: Path) -> None:
    """One projection of each kernel, which takes seconds to compile; the slow test has all modes of both."""
    left_out = ("upgrad 1 1 torch.float32 diagonal=False", "project 1 sum", "project 1 multipliers")
    launches = [
        *searches([(1, 1, 1)], [(1, 1, 1, 1)], [torch.float32]),
        *jacobians([(1, 1)], [torch.float32]),
        *correlations([(2, 1)], [2**31 + 5], [torch.float32]),
    ]
    assert set(left_out) < {name for name, _ in launches}
    launches = [(name, launcher) for name, launcher in launches if name not in left_out]
    check(launches, 89, compiled_for, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_specialisation(capability: int, compiled_for: Any, tmp_path: Path) -> None:
    # bfloat16 came with sm_80, and with it the screening that the search rests on.
    floats = FLOATS if capability >= 80 else (torch.float32, torch.float64)
    shapes = [(1, 1, 1), (1, 3, 16), (33, 512, 64), (7, 5, 3), (40, 33, 100)]
    maps = [(1, 1, 1, 1), (2, 64, 8, 8), (1, 16, 1, 1), (3, 1, 4, 4)]
    rows = [(1, 1), (1, 16), (2, 1), (3, 1), (4, 5000), (4, 4096), (8, 100), (9, 1), (16, 77), (33, 5)]
    batches = [(1, 1), (2, 10), (16, 16), (5, 64)]
    launches = [
        *searches(shapes, maps, floats),
        *jacobians(rows, floats),
        *correlations(batches, (1, 10**6, 2**31 + 5), (torch.float32, torch.float64)),
    ]
    check(launches, capability, compiled_for, tmp_path)
