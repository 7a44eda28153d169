"""`movae doctor`: versions, devices, which path each op takes, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from movae_fast import __version__, ops
from movae_fast.aggregation.registry import AGGREGATORS, FUSED
from movae_fast.data import DATASETS
from movae_fast.models import MODELS
from movae_fast.ops import extension

# Optional package -> what it is for and the extra that brings it.
EXTRAS = {
    "wandb": ("logging to Weights & Biases", "wandb"),
    "nvidia.dali": ("decoding images on the GPU", "dali"),
    "cvxpy": ("the aggregator nash_mtl", "solvers"),
    "torch_fidelity": ("FID and KID", "metrics"),
    "vector_quantize_pytorch": ("a peer in benchmarks", "bench"),
}
# Op -> the op whose search it contains.
SEARCHES = {"quantize": "nearest_code"}
# Ops that are CUDA C++ on CUDA, and nothing without it.
BY_NVCC = ("gramian_weights", "project_rows", "project_weights", "upgrad_weights")


def run(argv: Sequence[str]) -> int:
    """Print the report; the exit status is 1 if the extension is missing."""
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"doctor takes no flags, got {' '.join(argv)}")
    print(__doc__.strip() if argv else "\n".join(report()))
    return 0 if extension.csrc is not None else 1


def report() -> list[str]:
    lines = [f"movae-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name} {_version(name)}" for name in ("torch", "torchvision", "triton", "torchjd", "numpy")]
    lines += [
        "",
        "devices",
        f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        lines.append(f"  cuda:{i}: {card.name}, {memory}, sm_{card.major}{card.minor}")
    if not torch.cuda.is_available():
        lines.append(f"  cuda: none (torch is built for CUDA {torch.version.cuda or 'not at all'})")
    lines += ["", "extension", *_extension(), "", "ops"]
    lines += [f"  {name}: {path}" for name, path in op_paths().items()]
    lines += ["", "extras"]
    for module, (purpose, extra) in EXTRAS.items():
        found = _found(module)
        lines.append(
            f"  {module}: " + ("found" if found else f"missing ({purpose}): pip install 'movae-fast[{extra}]'")
        )
    lines += ["", f"models: {', '.join(MODELS)}", f"datasets: {', '.join(DATASETS)}"]
    others = [name for name in AGGREGATORS if name not in FUSED]
    return [
        *lines,
        f"aggregators: sum, {', '.join(FUSED)}; by TorchJD {', '.join(others)}",
    ]


def op_paths() -> dict[str, str]:
    """Op -> the implementation that a call takes, on a CPU and on CUDA."""
    return {name: _paths(name) for name in ops.__all__}


def _paths(op: str) -> str:
    module = getattr(ops, op).__module__
    if module == "movae_fast.reference":
        return f"plain torch ({module})"
    stem = module.removeprefix("movae_fast.ops.")
    if extension.csrc is None:
        on_cpu = "plain torch, because the extension is missing"
    else:
        # Loops over rows that have only one path name none.
        chosen = op == stem and getattr(extension.csrc, f"{SEARCHES.get(stem, stem)}_isa", None)
        on_cpu = f"C++ ({chosen()})" if chosen else "C++"
    if op in BY_NVCC:
        built = extension.csrc is not None and extension.csrc.build_info()["cuda"]
        missing = "TorchJD, on the host" if op == "gramian_weights" else "none"
        on_cuda = "CUDA C++" if built else f"{missing}: the extension was built without nvcc"
    elif _found("triton") and _found(f"movae_fast.kernels.{stem}") and op == stem:
        on_cuda = "Triton"
    else:
        on_cuda = "plain torch"
    return f"cpu {on_cpu}; cuda {on_cuda}"


def _extension() -> list[str]:
    _csrc = extension.csrc
    if _csrc is None:
        return ["  movae_fast._csrc: not built; pip install -e . with a C++ compiler"]
    info = _csrc.build_info()
    features = ", ".join(name for name, has in _csrc.cpu_features().items() if has) or "none"
    cuda = (
        "with the CUDA part"
        if info["cuda"]
        else "without the CUDA part (set CUDA_HOME to a toolkit with nvcc, rebuild)"
    )
    return [f"  movae_fast._csrc: gcc {info['compiler']}, {cuda}", f"  vector extensions: {features}"]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
