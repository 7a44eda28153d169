"""Check GPUs for `movae doctor --gpu`: every op, CUDA graphs, a short training, and the exchange between GPUs.

`run_checks` prints a row for each check as it ends, so that a machine which is lent for minutes has told what
it knows when they are over. What may end a process, or wait for ever, has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from movae_fast import ops
from movae_fast.aggregation import UPGrad
from movae_fast.cli.op_checks import CPU, Check, close, conflicting, milliseconds, op_checks, random
from movae_fast.data import DaliLoader, ImageFiles, ReadOptions
from movae_fast.data.loaders import dali

TIMEOUT = 150  # seconds that a process of its own may take
TRAINING = (
    "--dataset sprites --agg upgrad --image_size 32 --batch_size 16 --limit_train 320 --limit_test 32 "
    "--log_every 1 --device cuda"
)
# `movae` with its CUDA graphs counted: a step that could not be captured is only a warning to the trainer.
COUNTED = """
import sys, torch
from movae_fast.cli import main
count, replay = [], torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: (count.append(0), replay(graph))[1]
status = main(sys.argv[1:])
print(f"replayed {len(count)} times")
sys.exit(status)
"""


class NothingToCheckError(Exception):
    """Say that this machine lacks what a check needs, which is not a failure."""


def run_checks(checks: Iterable[tuple[str, str, Check]]) -> tuple[int, int]:
    """Run the checks (where, name, check), printing a row for each; return how many ran and failed."""
    ran = failed = 0
    for where, name, check in checks:
        started = time.perf_counter()
        ran += 1
        try:
            verdict, note = "ok", check()
        except NothingToCheckError as reason:
            ran -= 1
            verdict, note = "-", str(reason)
        except Exception as error:  # a check of its own: the next one may still tell something
            failed += 1
            verdict, note = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        print(
            f"{verdict:<6} {where:<7} {name:<42} {time.perf_counter() - started:6.1f} s  {note}",
            flush=True,
        )
    return ran, failed


def every_check() -> Iterator[tuple[str, str, Check]]:
    """Yield the checks of every visible GPU, and those of all of them together."""
    count = torch.cuda.device_count()
    known: set[tuple[int, int]] = set()
    for i in range(count):
        device = torch.device("cuda", i)
        if (kind := torch.cuda.get_device_capability(device)) not in known:
            known.add(kind)
            yield str(device), "kernels compiled ahead", partial(compiled_ahead, device)
        for name, check in [*op_checks(device), *capture_checks(device), *training_checks(i)]:
            yield str(device), name, check
        yield str(device), "DALI decodes on the device", partial(decodes, device)
    where = f"all {count}"
    yield where, "nccl exchanges", partial(exchanged, count, captured=False)
    yield where, "nccl exchanges in a CUDA graph", partial(exchanged, count, captured=True)
    if count > 1:
        yield where, "two steps by torchrun", partial(trained_by_torchrun, count)


def compiled_ahead(device: torch.device) -> str:
    """Do the op checks once in several processes, which leave what they compiled in Triton's cache.

    One process compiles for minutes. A check that fails here fails again in its own row, which says why.
    """
    count = max(1, min(8, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "movae_fast.cli.gpu_checks", "compile", str(device), str(count)]
    processes = [subprocess.Popen([*command, str(k)], stdout=subprocess.DEVNULL) for k in range(count)]
    try:
        statuses = [process.wait(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(statuses):
        raise RuntimeError(f"exit statuses {statuses}")
    return f"{count} process{'es' if count > 1 else ''}"


def compile_part(device: torch.device, count: int, k: int) -> None:
    """Compile every `count`-th kernel from the k-th on, as one of the processes of `compiled_ahead`."""
    for _, check in list(op_checks(device))[k::count]:
        with suppress(Exception):
            check()


def capture_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Yield what has to run without waiting for the host, and inside a CUDA graph."""
    rows = conflicting(4).to(device)
    z, codebook = random(4, 16, 8, 8).to(device), random(64, 16, seed=1).to(device)
    yield "UPGrad without a wait, in a CUDA graph", partial(captured, device, lambda: UPGrad()(rows))
    name = "quantize without a wait, in a CUDA graph"
    yield name, partial(captured, device, lambda: ops.quantize(z, codebook, deterministic=True)[2])


def captured(device: torch.device, work: Callable[[], Tensor]) -> str:
    """Do the work, with waiting for the device an error, and by a graph: the same result."""
    with torch.cuda.device(device):
        expected = work()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            of_graph = work()
        graph.replay()
        torch.cuda.synchronize()
        error = close([(of_graph, expected)], 1e-6)
        return f"error {error:.1e}; a replay: {milliseconds(graph.replay, device)}"


def training_checks(index: int) -> Iterator[tuple[str, Check]]:
    """Yield training through the command line on GPU `index`, alone in the process's sight."""
    for arch in ("vae", "vq_vae"):
        yield f"two steps of {arch}", partial(trained, index, f"--arch {arch} --compile off --steps 2")
    if index == 0:
        yield "a compiled step in one CUDA graph", partial(trained, index, "--arch vae --steps 8", replays=5)


def trained(index: int, flags: str, replays: int = 0) -> str:
    """Train in a temporary folder. Raises RuntimeError with the last lines of what was said."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"train {TRAINING} {flags} --exp_dir {folder}/run".split()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        only = visible[index] if index < len(visible) and visible[index] else str(index)
        said = spoken([sys.executable, "-c", COUNTED, *words], CUDA_VISIBLE_DEVICES=only)
    if replays and f"replayed {replays} times" not in said:
        reason = [line for line in said.splitlines() if "CUDA graph" in line or line.startswith("replayed")]
        raise RuntimeError(f"the step was not captured: {' | '.join(reason)}")
    return next((line for line in said.splitlines() if line.startswith("epoch ")), "")


def trained_by_torchrun(count: int) -> str:
    """Train on all GPUs together."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"train {TRAINING} --arch vae --compile off --steps 2".split()
        launcher = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node {count}"
        command = [sys.executable, *launcher.split(), "-m", "movae_fast", *words, "--exp_dir", f"{folder}/run"]
        said = spoken(command)
    return next((line for line in said.splitlines() if line.startswith("epoch ")), "")


def spoken(command: list[str], **environment: str) -> str:
    """Return what a process wrote. Raises RuntimeError with the end of it if the process failed."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stdout[-1500:]}"[-400:])
    return done.stdout


def decodes(device: torch.device) -> str:
    """Compare the dali loader's images on the device with its images on the CPU."""
    if not dali.available():
        raise NothingToCheckError("not installed")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:02d}.jpg" for i in range(24)]
        for i, file in enumerate(files):
            pixels = (random(4, 4, 3, seed=i) * 64 + 128).clamp(0, 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).resize((178, 218), Image.Resampling.BICUBIC).save(file, quality=90)
        batches = []
        for where in (CPU, device):
            options = ReadOptions(Path(), "test", 64, False, where)
            source = ImageFiles(files, options, (35, 15, 148, 148), "bicubic")
            loader = DaliLoader(source, 8, where, num_threads=2, train=False)
            batches.append(torch.cat([x.cpu().float() for x, _ in loader.epoch()]))
    difference = float((batches[0] - batches[1]).abs().mean((1, 2, 3)).max()) * 255
    if not difference <= 2:
        raise AssertionError(f"an image is {difference:.1f} of 255 from the CPU's on average")
    return f"at most {difference:.2f} of 255 from the CPU's on average"


def exchanged(count: int, captured: bool) -> str:
    """Sum, scatter and gather among one process a GPU, by nccl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "movae_fast.cli.gpu_checks",
            "exchange",
            str(count),
            f"{folder}/meeting",
        ]
        kind = "captured" if captured else "plain"
        processes = [
            subprocess.Popen(
                [*command, str(rank), kind], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for rank in range(count)
        ]
        try:
            said = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, words in zip(processes, said, strict=True):
            if process.returncode:
                raise RuntimeError(f"exit status {process.returncode}: {words[-400:]}")
    return f"{count} process{'es' if count > 1 else ''}"


def exchange(count: int, meeting: str, rank: int, kind: str, backend: str = "nccl") -> None:
    """Take part as process `rank` of `exchanged`. Raises AssertionError for a wrong sum."""
    device = torch.device("cuda", rank) if backend == "nccl" else CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count)
    mine = torch.full((1024 * count,), float(rank + 1), device=device)
    shard, whole = torch.empty(1024, device=device), torch.empty_like(mine)

    def exchange_once() -> None:
        dist.reduce_scatter_tensor(shard, mine)
        dist.all_gather_into_tensor(whole, shard)
        dist.all_reduce(whole)

    exchange_once()
    if kind == "captured":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # nccl's own thread asks for events meanwhile, which only this thread must not.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            exchange_once()
        whole.zero_()
        graph.replay()
        torch.cuda.synchronize()
        del graph  # before the communicator that it launches on
    expected = count * count * (count + 1) / 2
    if not bool((whole == expected).all()):
        raise AssertionError(f"rank {rank}: {whole[:3].tolist()}, not {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "compile":
        compile_part(torch.device(arguments[0]), int(arguments[1]), int(arguments[2]))
    else:
        exchange(int(arguments[0]), arguments[1], int(arguments[2]), arguments[3])
