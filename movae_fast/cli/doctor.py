"""Run `movae doctor`: print versions, devices, which implementation each op uses, and which optional packages
are missing."""

from __future__ import annotations

import importlib.util
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from movae_fast import __version__, ops
from movae_fast.aggregation.catalog import AGGREGATORS, FUSED
from movae_fast.cli.flags.doctor import DoctorFlags
from movae_fast.data import DATASETS
from movae_fast.models import MODELS
from movae_fast.ops import extension

# Optional package -> what it is for and the extra that brings it.
EXTRAS = {
    "wandb": ("logging to Weights & Biases", "wandb"),
    "mlflow": ("logging to MLflow", "mlflow"),
    "gradio": ("movae serve", "web"),
    "nvidia.dali": ("decoding images on the GPU", "dali"),
    "cvxpy": ("the aggregator nash_mtl", "solvers"),
    "torch_fidelity": ("FID and KID", "metrics"),
    "vector_quantize_pytorch": ("a peer in benchmarks", "bench"),
}
# Op -> the op whose search it contains.
SEARCHES = {"quantize": "nearest_code"}
# Ops that are CUDA C++ on CUDA where the extension was built with nvcc.
BY_NVCC = ("gramian_weights", "project_rows", "project_weights", "step_multipliers", "upgrad_weights")
BY_TORCH = ("linear_cross_entropy",)  # nothing to gain by a kernel of its own
# Op -> the file of kernels/ that it is computed by on CUDA.
TRITON = {
    "code_error": "quantize",
    "combine": "combine",
    "gramian": "gramian",
    "nearest_code": "nearest_code",
    "project_rows": "project_weights",
    "project_weights": "project_weights",
    "quantize": "quantize",
    "step_multipliers": "project_weights",
    "tc_terms": "tc_terms",
    "upgrad_weights": "project_weights",
}


def run(flags: DoctorFlags) -> int:
    """Print the report, or with --gpu run the checks of the GPUs, and return the exit status.

    It is 1 if the compiled extension is missing; with --gpu, if a check failed or there is no GPU.
    """
    if flags.gpu:
        return try_gpus()
    print("\n".join(report()))
    return 0 if extension.csrc is not None else 1


def try_gpus() -> int:
    """Run every check on every GPU and print a row for each; return the exit status, 1 if one failed or there
    is no GPU."""
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        print(f"movae doctor --gpu: no GPU to try ({built}, and sees no device)", flush=True)
        return 1
    # Imported here: it brings the data sets and torch.distributed, which the report does without.
    from movae_fast.cli.gpu_checks import every_check, run_checks

    started = time.perf_counter()
    print("\n".join([*_heading(), "devices", *_gpus(), "extension", *_extension(), ""]), flush=True)
    if reason := extension.cuda_missing():
        print(f"CUDA C++ is not tried, Triton alone: {reason}\n", flush=True)
    ran, failed = run_checks(every_check())
    print(f"\n{ran} checks, {failed} failed, {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if failed else 0


def report() -> list[str]:
    lines = [
        *_heading(),
        "",
        "devices",
        f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        *_gpus(),
    ]
    if not torch.cuda.is_available():
        lines.append(f"  cuda: none (torch is built for CUDA {torch.version.cuda or 'not at all'})")
    lines += ["", "extension", *_extension(), "", "ops"]
    lines += [f"  {name}: {path}" for name, path in op_paths().items()]
    lines += ["", "extras"]
    for module, (purpose, extra) in EXTRAS.items():
        missing = f"missing ({purpose}): pip install 'movae-fast[{extra}]'"
        lines.append(f"  {module}: {'found' if _found(module) else missing}")
    lines += ["", f"models: {', '.join(MODELS)}", f"datasets: {', '.join(DATASETS)}"]
    others = [name for name in AGGREGATORS if name not in FUSED]
    return [
        *lines,
        f"aggregators: sum, {', '.join(FUSED)}; by TorchJD {', '.join(others)}",
    ]


def op_paths() -> dict[str, str]:
    """Return for each op which implementation it uses here, on a CPU and on CUDA, as text for the report."""
    return {name: _paths(name) for name in ops.__all__}


def _paths(op: str) -> str:
    module = getattr(ops, op).__module__
    if module == "movae_fast.reference":
        return f"plain torch ({module})"
    stem = module.removeprefix("movae_fast.ops.")
    if op in BY_TORCH:
        return "torch's products in chunks, on a CPU and on CUDA"
    if extension.csrc is None:
        on_cpu = "plain torch, because the extension is missing"
    else:
        # Loops over rows that have only one path name none.
        chosen = op == stem and getattr(extension.csrc, f"{SEARCHES.get(stem, stem)}_isa", None)
        on_cpu = f"C++ ({chosen()})" if chosen else "C++"
    if op in BY_NVCC and not (missing := _no_cuda_cpp()):
        on_cuda = "CUDA C++"
    elif op == "gramian_weights":
        on_cuda = f"the host, m x m numbers copied, no CUDA graph: {missing}"
    elif op in TRITON and _found("triton") and _found(f"movae_fast.kernels.{TRITON[op]}"):
        on_cuda = "Triton"
    else:
        on_cuda = "plain torch"
    return f"cpu {on_cpu}; cuda {on_cuda}"


def _no_cuda_cpp() -> str:
    """Return why the ops in CUDA C++ are not used, or "" if they are (without a GPU: would be)."""
    if torch.cuda.is_available() or extension.csrc is None or not extension.csrc.build_info()["cuda"]:
        return extension.cuda_missing()
    return ""


def _heading() -> list[str]:
    lines = [f"movae-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    return lines + [
        f"  {name} {_version(name)}" for name in ("torch", "torchvision", "triton", "torchjd", "numpy")
    ]


def _gpus() -> list[str]:
    lines = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        lines.append(f"  cuda:{i}: {card.name}, {memory}, sm_{card.major}{card.minor}")
    return lines


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
