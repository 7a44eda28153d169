"""The kernel of ops.code_error compiles for every generation, without spills, as its launcher asks for it."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from movae_fast.kernels import quantize
from tests.test_kernels_aot import POINTER, SHARED, Case, _fresh_cache, check  # noqa: F401


def cases() -> list[Case]:
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        types = {"z_ptr": POINTER[dtype], "codebook_ptr": POINTER[dtype], "index_ptr": "*i64"}
        types |= {"sq_err_ptr": "*fp64" if dtype == torch.float64 else "*fp32"}
        types |= dict.fromkeys(("N", "K", "D", "inner", "z_row", "z_position", "z_d"), "i32")
        for channel_first in (False, True):
            constants = {"CHANNEL_FIRST": channel_first, "BN": 32, "BD": 32}
            kernel = quantize._code_error_kernel
            made.append(Case(f"code_error {dtype} {channel_first}", kernel, types, constants))
    return made


@pytest.mark.parametrize("capability", SHARED)
def test_code_error_compiles(capability: int, tmp_path: Path) -> None:
    """Each third of the cases; the slow test has all of them for every capability."""
    check(cases()[list(SHARED).index(capability) :: len(SHARED)], capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_code_error_compiles_in_every_case(capability: int, tmp_path: Path) -> None:
    check(cases(), capability, tmp_path)
