"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, without a GPU, without spills, within shared
memory."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from movae_fast.kernels import combine, gramian, nearest_code, project_weights, quantize, tc_terms  # noqa: E402

# Shared memory a block may ask for, in bytes (CUDA C programming guide, table of compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The projection compiles quickly enough to be tried on consumer cards, too.
SHARED_OF_ALL = SHARED | {86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}
POINTER = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP = shutil.which("cuobjdump") or str(TOOLS / "cuobjdump")


@dataclass
class Case:
    """One specialisation of a kernel: what the launcher would ask Triton for."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = field(default=())  # scalars that are multiples of 16
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, capability: int) -> Any:
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        aligned = [n for n in names if signature[n].startswith("*") or n in self.divisible]
        source = ASTSource(
            self.kernel,
            signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(compiled: Any, capability: int, folder: Path) -> int:
    """Bytes of registers that ptxas spilled. It is run again, as Triton ran it, only where the code has a
    stack at all. A convergence barrier or a predicate kept there (8 bytes, while registers are free) counts
    among ptxas's spills and is none."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    assert used["REG"] > 0, report
    if not used["STACK"] and not used["LOCAL"]:
        return 0
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    name = str(TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas"))
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
    assert target is not None
    command = [name, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lost = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    return 0 if lost <= 32 and used["REG"] < 250 else lost


def search_cases(
    D: int, dtype: torch.dtype, exact: bool, capability: int, precision: str = "bf16"
) -> Iterator[Case]:
    screen = nearest_code.screening(dtype, precision)
    screened = torch.bfloat16 if screen == "bf16" else dtype
    types = {
        **dict.fromkeys(("N", "K", "D", "inner", "stride_row", "stride_position", "stride_d"), "i32"),
        **{
            "z_ptr": POINTER[dtype],
            "screen_ptr": POINTER[screened],
            "codebook_ptr": POINTER[dtype],
            "eps": "fp32",
        },
        **{"half_ptr": "*fp64", "base_ptr": "*fp32", "norm_ptr": "*fp32", "highest_ptr": "*fp32"},
        **{"index_ptr": "*i64", "list_ptr": "*i32", "count_ptr": "*i32"},
    }
    divisible = ("D", "stride_row") if D % 16 == 0 else ()
    for config in nearest_code.candidates(D, exact, capability, nearest_code.is_wide(dtype, screen)):
        tile = dict(config)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        for channel_first in (False, True):
            constants = {
                "CHANNEL_FIRST": channel_first,
                "EXACT": exact,
                "SCREEN": screen,
                "ONE_TILE": tile["BD"] >= D,
            }
            yield Case(
                f"nearest_code D={D} {dtype} {constants} {tile}",
                nearest_code._nearest_code_kernel,
                types,
                {**constants, **tile},
                warps,
                stages,
                divisible,
            )
    scan = {name: types[name] for name in types if name in nearest_code._every_code_kernel.arg_names}
    yield Case(
        f"every_code D={D} {dtype}",
        nearest_code._every_code_kernel,
        scan,
        {"CHANNEL_FIRST": False, **nearest_code.SCAN},
        divisible=divisible,
    )


def tc_cases(D: int, dtype: torch.dtype) -> Iterator[Case]:
    for kernel in (
        tc_terms._tc_terms_kernel,
        tc_terms._tc_terms_grad_z_kernel,
        tc_terms._tc_terms_grad_posterior_kernel,
    ):
        types = {name: POINTER[dtype] for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {"batch": "i32", "dims": "i32", "n_data": "i32"}
        for stratified in (False, True):
            constants = {"STRATIFIED": stratified, **tc_terms.tile(D, torch.finfo(dtype).bits // 8)}
            if "LOWEST" in kernel.arg_names:
                constants["LOWEST"] = torch.finfo(dtype).min
            yield Case(f"{kernel.__name__} D={D} {dtype} {stratified}", kernel, types, constants)


def jacobian_cases(m: int, dtype: torch.dtype) -> Iterator[Case]:
    scalars = {"m": "i32", "P": "i64", "stride": "i64"}
    rows = {"rows_ptr": POINTER[dtype]}
    yield Case(
        f"gramian m={m} {dtype}",
        gramian._gramian_kernel,
        {**rows, "part_ptr": "*fp64", **scalars},
        gramian.tile(m),
        divisible=("stride",),
    )
    yield Case(
        f"combine m={m} {dtype}",
        combine._combine_kernel,
        {**rows, "weights_ptr": "*fp64", "out_ptr": POINTER[dtype], "P": "i64", "stride": "i64"},
        {"M": m, "UNROLL": m <= 16, "B": 2048 // (2 if dtype == torch.float64 else 1)},
        num_warps=8,
        divisible=("stride",),
    )


PROJECTION = {
    **dict.fromkeys(("gramian_ptr", "given_ptr", "each_ptr", "out_ptr", "part_ptr"), "*fp64"),
    **{"status_ptr": "*i32", "counter_ptr": "*i32", "m": "i32", "rows": "i32", "problems": "i32"},
    **{"P": "i64", "stride": "i64", "norm_eps": "fp64", "reg_eps": "fp64"},
}


def typed(kernel: Any, **types: str) -> dict[str, str]:
    return {name: kind for name, kind in {**PROJECTION, **types}.items() if name in kernel.arg_names}


def project_cases(m: int) -> Iterator[Case]:
    kernel, M = project_weights._project_kernel, project_weights.padded(m)
    for mode, value in project_weights.MODES.items():
        for diagonal in (False, True):
            yield Case(
                f"project m={m} {mode} diagonal={diagonal}",
                kernel,
                typed(kernel),
                {"MODE": value, "DIAGONAL": diagonal, "M": M},
                project_weights.warps(M),
                options={"enable_fp_fusion": False, "maxnreg": project_weights.ALL_REGISTERS},
            )


def upgrad_cases(m: int, dtype: torch.dtype) -> Iterator[Case]:
    kernel = project_weights._upgrad_kernel
    for mode, value in project_weights.MODES.items():
        for diagonal in (False, True):
            constants = project_weights.layout(m, m if mode == "sum" else 1)
            warps, registers = constants.pop("num_warps"), constants.pop("maxnreg")
            yield Case(
                f"upgrad m={m} {dtype} {mode} diagonal={diagonal}",
                kernel,
                typed(kernel, rows_ptr=POINTER[dtype]),
                {"MODE": value, "DIAGONAL": diagonal, **constants},
                warps,
                divisible=("stride",),
                options={"enable_fp_fusion": False, "maxnreg": registers},
            )


def small_cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    yield Case(
        "gramian_sum",
        gramian._gramian_sum_kernel,
        {"part_ptr": "*fp64", "out_ptr": "*fp64", "entries": "i32", "programs": "i32"},
        gramian.SUM,
    )
    for dtype in dtypes:
        wide = "*fp64" if dtype == torch.float64 else "*fp32"
        strides = {f"{t}_{n}": "i32" for t in "zq" for n in ("row", "position", "d")}
        scalars = {"N": "i32", "D": "i32", "inner": "i32"}
        pointers = {"z_ptr": POINTER[dtype], "codebook_ptr": POINTER[dtype], "z_q_ptr": POINTER[dtype]}
        pointers |= {"index_ptr": "*i64", "sq_err_ptr": wide, "count_ptr": "*i32", "code_sum_ptr": wide}
        for atomics in (False, True):
            constants = {"CHANNEL_FIRST": True, "ATOMICS": atomics, "BN": 32, "BD": 32}
            kernel = quantize._quantize_kernel
            yield Case(f"quantize {dtype} {atomics}", kernel, {**pointers, **scalars, **strides}, constants)
        sums = {"z_ptr": POINTER[dtype], "order_ptr": "*i64", "begin_ptr": "*i64", "count_ptr": "*i32"}
        sums |= {
            "code_sum_ptr": wide,
            "D": "i32",
            "inner": "i32",
            **{n: strides[n] for n in strides if n[0] == "z"},
        }
        constants = {"CHANNEL_FIRST": True, "BN": 32, "BD": 32}
        yield Case(f"code_sum {dtype}", quantize._code_sum_kernel, sums, constants)
        codebook = {
            "codebook_ptr": POINTER[dtype],
            "screen_ptr": "*bf16",
            "half_ptr": "*fp64",
            "base_ptr": "*fp32",
        }
        codebook |= {"norm_ptr": "*fp32", "highest_ptr": "*fp32", "K": "i32", "D": "i32"}
        constants = {"COPY": dtype != torch.bfloat16, "BK": 32, "BD": 64}
        yield Case(f"codebook {dtype}", nearest_code._codebook_kernel, codebook, constants)


def check(cases: list[Case], capability: int, folder: Path) -> None:
    complaints = []
    for case in cases:
        compiled = case.compile(capability)
        if lost := spilled(compiled, capability, folder):
            complaints.append(f"{case.name}: {lost} bytes spilled")
        if compiled.metadata.shared > SHARED_OF_ALL[capability]:
            complaints.append(f"{case.name}: {compiled.metadata.shared} bytes of shared memory")
    assert not complaints, f"sm_{capability}:\n" + "\n".join(complaints)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all tests of this run, on all workers: several tests look at the same kernel."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "kernels"))


@pytest.mark.parametrize("capability", SHARED)
def test_main_shapes(capability: int, tmp_path: Path) -> None:
    """The search, and each third of the other kernels; test_every_other_kernel, which is slow, has all."""
    others = [
        *tc_cases(10, torch.float32),
        *jacobian_cases(4, torch.float32),
        *small_cases([torch.float32]),
    ]
    mine = others[list(SHARED).index(capability) :: len(SHARED)]
    check([next(search_cases(64, torch.float32, True, capability)), *mine], capability, tmp_path)


def test_hopper_screens_on_its_own_matrix_instructions() -> None:
    case = next(search_cases(64, torch.float32, True, 90))
    assert "wgmma.mma_async" in case.compile(90).asm["ptx"]


@pytest.mark.parametrize("capability", SHARED)
def test_operands_are_rounded_to_nearest(capability: int) -> None:
    """What the certificate's 2^-8 rests on; truncation would err by twice as much."""
    case = next(search_cases(64, torch.float32, True, capability))
    conversions = set(re.findall(r"cvt\.[\w.]*bf16\w*\.f32", case.compile(capability).asm["ptx"]))
    assert conversions
    assert all(name.startswith("cvt.rn.") for name in conversions), conversions


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """The check can fail: 8 x 8 x 64 float64 sums and their operands do not fit one warp."""
    case = next(jacobian_cases(8, torch.float32))
    case.num_warps = 1
    with pytest.raises(AssertionError, match="bytes spilled"):
        check([case], 90, tmp_path)


# Consumer cards, which have the least shared memory, and a data centre's: each with one kernel.
# test_every_projection, which is slow, has both kernels and all sizes on every capability.
PROJECTED = {
    86: lambda: next(upgrad_cases(8, torch.float32)),
    90: lambda: next(project_cases(8)),
    120: lambda: next(upgrad_cases(2, torch.float32)),
}


@pytest.mark.parametrize("capability", PROJECTED)
def test_projection(capability: int, tmp_path: Path) -> None:
    check([PROJECTED[capability]()], capability, tmp_path)


def test_the_refinement_has_no_multiply_add() -> None:
    """With one, the errors of the products would not be what is computed. The launcher must ask for that."""
    case = next(project_cases(8))
    assert "fma.rn.f64" not in case.compile(90).asm["ptx"]
    case.options = {}
    assert "fma.rn.f64" in case.compile(90).asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_OF_ALL)
def test_every_projection(capability: int, tmp_path: Path) -> None:
    cases = [case for m in (8, 16, 32) for case in project_cases(m)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cases += [case for m in (1, 2, 3, 8, 16, 64) for case in upgrad_cases(m, dtype)]
    check(cases, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_OF_ALL)
def test_the_largest_projection_fits(capability: int, tmp_path: Path) -> None:
    """64 rows take all registers that 256 threads can have; a handful of indices beyond those do no harm."""
    for case in project_cases(64):
        compiled = case.compile(capability)
        lost = spilled(compiled, capability, tmp_path)
        print(f"sm_{capability}: {case.name}: {lost} bytes spilled")
        assert lost <= 128, case.name
        assert compiled.metadata.shared <= SHARED_OF_ALL[capability]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 3, 16, 63, 64, 65, 128, 256, 1024])
@pytest.mark.parametrize("capability", SHARED)
def test_every_search(capability: int, D: int, dtype: torch.dtype, tmp_path: Path) -> None:
    precisions = ("bf16", "tf32") if dtype == torch.float32 else ("bf16",)
    cases = [
        case
        for exact in (True, False)
        for precision in precisions
        for case in search_cases(D, dtype, exact, capability, precision)
    ]
    check(cases, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_other_kernel(capability: int, tmp_path: Path) -> None:
    cases = [
        case
        for D in (1, 10, 16, 32, 64, 128, 256)
        for dtype in (torch.float32, torch.float64)
        for case in tc_cases(D, dtype)
    ]
    cases += [
        case
        for m in (1, 2, 3, 4, 8, 16, 64)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for case in jacobian_cases(m, dtype)
    ]
    cases += small_cases([torch.float32, torch.bfloat16, torch.float64])
    check(cases, capability, tmp_path)
