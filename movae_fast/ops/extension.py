"""The compiled part, or what stands in for it: plain torch on a CPU, which says so once."""

import importlib
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from movae_fast import reference


def _load() -> Any:
    try:
        return importlib.import_module("movae_fast._csrc")
    except ImportError:
        return None


csrc: Any = _load()

# As csrc/common/dtype.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def keep_freed_memory() -> None:
    """Spare a training process the page faults of memory that it frees and allocates again at every step.

    It changes the allocator of the whole process, so it is the trainer's to call, not an import's.
    """
    if csrc is not None:
        csrc.keep_freed_memory()


def missing(z: Tensor) -> bool:
    """Whether an op on z has to fall back; the first that does warns."""
    if csrc is not None or z.device.type != "cpu":
        return False
    _warn()
    return True


@cache
def cuda_missing() -> str:
    """Return why csrc's CUDA half is of no use on this machine's GPUs, in one line; empty where it is of use.

    The ops have Triton or the host instead, so nothing raises because of it. Asked once a process.
    """
    if csrc is None:
        return "movae_fast._csrc is not built"
    built = csrc.build_info()
    if not built["cuda"] or not hasattr(csrc, "cuda_versions"):
        return "the extension was built without nvcc"
    driver, runtime = csrc.cuda_versions()
    if driver == 0:
        return "there is no CUDA driver"
    # Any driver of the same major version runs what this runtime compiled; an older one runs nothing of it.
    if driver // 1000 < runtime // 1000:
        return f"the driver serves CUDA {_dotted(driver)}, the extension was built with {_dotted(runtime)}"
    compiled = [int(number) for number in built.get("architectures", "").split(",") if number]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        # A binary runs on GPUs of its own generation; PTX, kept of the newest, is compiled by a newer driver.
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


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """ops.nearest_code by the reference in float64, a chunk of rows at a time."""
    rows = as_rows(z.detach()).double()
    codebook = codebook.detach().double()
    (usable,) = codebook.isfinite().all(1).nonzero(as_tuple=True)
    if len(usable) == 0:
        return rows.new_zeros(index_shape(z), dtype=torch.int64)
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, torch.nan)
    found = [reference.nearest_code(part, codebook[usable]) for part in rows.split(1024)]
    index = torch.where(rows.isnan().any(1), 0, usable[torch.cat(found)])
    return index.view(index_shape(z))


def quantize(z: Tensor, codebook: Tensor, gradient: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ops.quantize by the reference; torch differentiates it."""
    index = nearest_code(z, codebook)
    wide = torch.promote_types(z.dtype, torch.float32)
    rows, codes = as_rows(z).to(wide), codebook[index.flatten()].to(wide)
    if gradient == "straight_through":
        codes = reference.straight_through(rows, codes)
    elif gradient == "rotation":
        codes = reference.rotation_trick(rows, codes)
    count = torch.bincount(index.flatten(), minlength=len(codebook)).to(wide)
    code_sum = torch.zeros(codebook.shape, dtype=wide).index_add_(0, index.flatten(), rows.detach())
    return as_map(codes.to(z.dtype), z), index, code_error(z, codebook, index), count, code_sum


def code_error(z: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    """ops.code_error by the reference; a negative index would count from the codebook's end."""
    beyond = (index < 0) | (index >= len(codebook))
    if beyond.any():
        at = int(beyond.flatten().nonzero()[0])
        raise IndexError(
            f"code_error: index {int(index.flatten()[at])} at position {at} does not lie in "
            f"[0, {len(codebook)}), the codebook's; leave out masked vectors, whose index is -1"
        )
    wide = torch.promote_types(z.dtype, torch.float32)
    error = reference.code_error(as_rows(z).to(wide), codebook.to(wide), index.flatten())
    return error.view(index_shape(z))


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """ops.combine: added up in float32 at least, rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (weights.to(wide) @ rows.to(wide)).to(rows.dtype)


def project_weights(
    gramian: Tensor, given: Tensor | None, kind: str, diagonal: bool, norm_eps: float, reg_eps: float
) -> tuple[Tensor, Tensor]:
    """Do what csrc.project_weights does by the reference."""
    m = len(gramian)
    given = torch.full((m,), 1 / m, dtype=torch.float64) if given is None else given.double()
    if not gramian.isfinite().all():
        return torch.full_like(given, torch.nan), torch.tensor(-1, dtype=torch.int32)
    solved = torch.tensor(0, dtype=torch.int32)
    regularizer: reference.Regularizer = "diagonal" if diagonal else "trace"
    if kind == "sum":
        if given.isnan().any() or (given == torch.inf).any():
            return torch.full_like(given, torch.nan), solved
        return reference.project_weights(gramian, given, norm_eps, reg_eps, regularizer), solved
    rows = given.reshape(-1, m)
    usable = rows.isfinite().all(1)
    found = torch.full_like(rows, torch.nan)
    if kind == "multipliers":
        for r in usable.nonzero()[:, 0]:
            found[r] = reference.step_multipliers(gramian, rows[r], reg_eps)
    elif bool(usable.any()):
        found[usable] = reference.project_rows(rows[usable], gramian, norm_eps, reg_eps, regularizer)
    return found.view(given.shape), solved


def gramian_weights(
    gramian: Tensor, method: str, pref: Tensor | None, order: Tensor | None, a: float, b: float, iterations: int
) -> Tensor:
    """ops.gramian_weights by TorchJD's own classes, which read values on the host."""
    import torchjd.aggregation as jd  # the other ops do without TorchJD

    gramian = gramian.double()
    if not gramian.isfinite().all():
        return torch.full_like(gramian[0], torch.nan)
    if method == "pcgrad":
        assert order is not None
        if not torch.equal(order.sort(1).values, torch.arange(len(order)).expand_as(order)):
            raise ValueError(f"gramian_weights: each row of order must be a permutation of 0..{len(order) - 1}")
        return reference.pcgrad(gramian, order)
    if method == "cagrad":
        weighting = jd.CAGradWeighting(a, norm_eps=b)
    elif method == "imtl_g":
        weighting = jd.IMTLGWeighting()
    elif method == "mgda":
        weighting = jd.MGDAWeighting(a, iterations)
    else:
        pref = None if pref is None else pref.double()
        weighting = jd.AlignedMTLWeighting(pref, scale_mode=method.removeprefix("aligned_mtl_"))
    return weighting(gramian).detach()


def index_shape(z: Tensor) -> tuple[int, ...]:
    """[N] of [N, D]; [B, *spatial] of [B, D, *spatial]."""
    return (z.shape[0], *z.shape[2:])


def as_rows(z: Tensor) -> Tensor:
    """[B, D, *spatial] as [N, D]."""
    return z if z.dim() == 2 else z.movedim(1, -1).reshape(-1, z.shape[1])


def as_map(rows: Tensor, z: Tensor) -> Tensor:
    """[N, D] in the shape of z."""
    return rows if z.dim() == 2 else rows.view(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)
