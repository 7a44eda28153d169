"""Load the compiled C++ extension, report what it supports on this machine, and force an instruction set."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _load() -> Any:
    try:
        return importlib.import_module("movae_fast._csrc")
    except ImportError:
        return None


csrc: Any = _load()

# As csrc/common/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for its next allocations: training allocates the same
    sizes at every step, and reuse saves page faults.

    This changes the allocator of the whole process, so the trainer calls it; importing the package does not.
    """
    if csrc is not None:
        csrc.keep_freed_memory()


def missing(z: Tensor) -> bool:
    """Return whether an op on the CPU tensor z must fall back on movae_fast.reference, because the compiled
    extension was not built; the first fallback warns."""
    if csrc is not None or z.device.type != "cpu":
        return False
    _warn()
    return True


@cache
def lacks(function: str) -> bool:
    """Return whether the compiled extension is missing, or was built before it had a function.

    The latter warns once: sources were updated, and the extension beside them was not.
    """
    if csrc is None or hasattr(csrc, function):
        return csrc is None
    warnings.warn(
        f"movae_fast._csrc is older than this package (it has no {function}): plain torch is used instead, "
        "slower and with more memory. Build it again (pip install -e .).",
        stacklevel=4,
    )
    return True


@cache
def cuda_missing() -> str:
    """Return, in one line, why the compiled extension's CUDA code cannot be used on this machine's GPUs; "" if
    it can.

    Nothing raises for that reason, since each op also has a Triton or a host implementation. The answer is
    computed once per process.
    """
    if csrc is None:
        return "movae_fast._csrc is not built"
    built = csrc.build_info()
    if not built["cuda"] or not hasattr(csrc, "cuda_versions"):
        return "the extension was built without nvcc"
    driver, runtime = csrc.cuda_versions()
    if driver == 0:
        return "there is no CUDA driver"
    # A driver of an older major version than the runtime cannot run any of its code.
    if driver // 1000 < runtime // 1000:
        return f"the driver serves CUDA {_dotted(driver)}, the extension was built with {_dotted(runtime)}"
    compiled = [int(number) for number in built.get("architectures", "").split(",") if number]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        # A binary runs on GPUs of its own generation; for newer GPUs the driver compiles the PTX of the newest
        # one.
        binary = any(number // 10 == major and number % 10 <= minor for number in compiled)
        if not binary and (max(compiled, default=0) > 10 * major + minor or driver < runtime):
            return f"the extension was built for {built['architectures']}, not for cuda:{i}'s {major}{minor}"
    return ""


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@cache
def _warn() -> None:
    warnings.warn(
        "movae_fast._csrc is not built: the CPU ops run in plain torch, slower and with more memory. "
        "Install with a C++ compiler at hand (pip install -e .), then ask `movae doctor`.",
        stacklevel=4,
    )


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the CPU ops with the instruction set `name` inside the block; "" means the fastest one of this
    machine.

    It sets the environment variable MOVAE_CPU_ISA, which the C++ code reads at each call: amx, avx512_bf16,
    avx512, avx2 or portable. An op raises ValueError for an instruction set that this machine does not have.
    """
    before = os.environ.get("MOVAE_CPU_ISA")
    os.environ["MOVAE_CPU_ISA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOVAE_CPU_ISA"]
        else:
            os.environ["MOVAE_CPU_ISA"] = before


def exporting() -> bool:
    """Return whether torch.export is tracing, whose programs hold no operators of ours.

    Within torch.compile the answer is no: dynamo takes `torch.compiler.is_exporting()` for true there.
    """
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def index_shape(z: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor with one number per vector of z: [N] for z [N, D], [B, *spatial] for z
    [B, D, *spatial]."""
    return (z.shape[0], *z.shape[2:])


def as_rows(z: Tensor) -> Tensor:
    """Reshape z, [N, D] or channel-first [B, D, *spatial], to one vector per row, [N, D]."""
    return z if z.dim() == 2 else z.movedim(1, -1).reshape(-1, z.shape[1])


def as_map(rows: Tensor, z: Tensor) -> Tensor:
    """Reshape `rows` [N, D] to the shape of z, [N, D] or channel-first [B, D, *spatial]; this undoes
    `as_rows`."""
    return rows if z.dim() == 2 else rows.view(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)
