"""The search's certificate describes the compiled kernel: no bound begins in a tensor core's accumulator.

A tensor core aligns the accumulator and the products to the largest exponent among them and cuts what falls
below. The certificate allows for that among the products, whose size is bounded by ||z|| ||c||. If the compiler
moved ||c||^2 / 2 into the accumulator, as it does with a sum of a product and something else, then a row far
shorter than its codes would lose its products, and a wrong code could win.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from tests.test_kernels_aot import SHARED, _fresh_cache, search_cases  # noqa: F401

ZERO = r"arith\.constant dense<0\.0+e\+00>"
DOT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) %[\w#]+, %[\w#]+, (%[\w#]+)")
# The accumulator lies in tensor memory, and the fourth operand says whether it is added to.
BLACKWELL_DOT = re.compile(r"ttng\.tc_gen5_mma %[\w#]+, %[\w#]+, (%[\w#]+), (%[\w#]+)")
STORED = re.compile(r"ttng\.tmem_store (%[\w#]+), (%[\w#]+)")


def is_zero(text: str, value: str) -> bool:
    return re.search(rf"{re.escape(value)} = {ZERO}", text) is not None


def begins_as_zero(text: str, value: str) -> bool:
    """Whether an accumulator is a zero constant, or what a loop over D carries on from one."""
    name = value.partition("#")[0]
    if is_zero(text, name):
        return True
    carried = re.search(rf"{re.escape(name)} = (%[\w#]+)[,)]", text)  # of a loop's iter_args
    if carried:
        return begins_as_zero(text, carried[1])
    earlier = re.search(rf"{re.escape(name)}(?::\d+)? = ttng\.warp_group_dot_wait (%[\w#]+)", text)
    if earlier:
        return begins_as_zero(text, earlier[1])
    dot = re.search(rf"{re.escape(name)} = {DOT.pattern}", text)
    return dot is not None and begins_as_zero(text, dot[1])


def accumulators_not_zero(text: str) -> list[str]:
    """The dots of a kernel in Triton's GPU dialect whose accumulator begins as something else than zero."""
    found = [m[0] for m in DOT.finditer(text) if not begins_as_zero(text, m[1])]
    stores: dict[str, list[str]] = {}
    for m in STORED.finditer(text):
        stores.setdefault(m[2], []).append(m[1])
    for m in BLACKWELL_DOT.finditer(text):
        # %false: begun anew. Else it goes on with earlier products, on what was stored there first.
        first = stores.get(m[1], [])
        begun_anew = any(m[1] == other[1] and other[2] == "%false" for other in BLACKWELL_DOT.finditer(text))
        if not all(is_zero(text, value) for value in first) or not (first or begun_anew):
            found.append(m[0])
    return found


ALL = [
    (D, dtype, exact)
    for D in (16, 64, 128, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for exact in (True, False)
]
# Each generation's matrix instructions, each precision and more than one tile over D; the slow tests are all.
AT_ONCE = [
    *((capability, 64, torch.float32, True) for capability in SHARED),
    (90, 64, torch.bfloat16, False),
    (100, 256, torch.float32, True),
]


@pytest.mark.parametrize(
    ("capability", "D", "dtype", "exact"),
    [
        pytest.param(capability, *case, marks=() if (capability, *case) in AT_ONCE else pytest.mark.slow)
        for capability in SHARED
        for case in ALL
    ],
    ids=str,
)
def test_every_accumulator_begins_as_zero(capability: int, D: int, dtype: torch.dtype, exact: bool) -> None:
    seen = set()
    for case in search_cases(D, dtype, exact, capability):
        if case.kernel.__name__ != "_nearest_code_kernel" or case.constants["CHANNEL_FIRST"]:
            continue
        text = case.compile(capability).asm["ttgir"]
        dots = len(DOT.findall(text)) + len(BLACKWELL_DOT.findall(text))
        assert dots, case.name
        seen.add(dots)
        assert not accumulators_not_zero(text), case.name
    assert seen
