"""Check GPUs for `movae doctor --gpu`: every op, CUDA graphs, a short training, and the exchange between GPUs.

`run_checks` prints a row as soon as a check ends, so that the results so far are kept if the time on the
machine runs out. Checks that could crash or hang run in a process of their own, with a time limit.
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
    """Report that a check does not apply because this machine lacks what it needs; it does not count as a
    failure."""


def run_checks(checks: Iterable[tuple[str, str, Check]]) -> tuple[int, int]:
    """Run the checks (where, name, check) and print a row for each; return (how many ran, how many failed).

    where: the device as text; check: a function that returns a note for the row, and raises if something is
    wrong.
    """
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
    """Yield (device, name, check) for every visible GPU, then for all GPUs together."""
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
    """Fill Triton's cache by running the op checks in several processes, and return the number of processes as
    text.

    In one process the compilation would take minutes. A check that fails here is ignored; it fails again in its
    own row, with the reason. Raises RuntimeError if a process ends with an error.
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
    """Run every `count`-th op check from the k-th on, to compile its kernels: the work of one process of
    `compiled_ahead`."""
    for _, check in list(op_checks(device))[k::count]:
        with suppress(Exception):
            check()


def capture_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Yield (name, check) for the ops that must run without waiting for the GPU and inside a CUDA graph."""
    rows = conflicting(4).to(device)
    z, codebook = random(4, 16, 8, 8).to(device), random(64, 16, seed=1).to(device)
    yield "UPGrad without a wait, in a CUDA graph", partial(captured, device, lambda: UPGrad()(rows))
    name = "quantize without a wait, in a CUDA graph"
    yield name, partial(captured, device, lambda: ops.quantize(z, codebook, deterministic=True)[2])


def captured(device: torch.device, work: Callable[[], Tensor]) -> str:
    """Check that `work` runs without synchronizing with the GPU, and that a CUDA graph of it gives the same
    result.

    Returns the relative error and the time of a replay as text. Raises if `work` synchronizes or the results
    differ.
    """
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
    """Yield (name, check) for short trainings through the command line that see GPU `index` only."""
    for arch in ("vae", "vq_vae"):
        yield f"two steps of {arch}", partial(trained, index, f"--arch {arch} --compile off --steps 2")
    if index == 0:
        yield "a compiled step in one CUDA graph", partial(trained, index, "--arch vae --steps 8", replays=5)


def trained(index: int, flags: str, replays: int = 0) -> str:
    """Train with the given flags on GPU `index` in a new process, and return its line about the epoch.

    Raises RuntimeError with the end of the output if the training fails, or if `replays` is given and the
    step's CUDA graph was not replayed that often.
    """
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
    """Train two steps on `count` GPUs together, started by torchrun, and return the line about the epoch."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"train {TRAINING} --arch vae --compile off --steps 2".split()
        launcher = f"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc_per_node {count}"
        command = [sys.executable, *launcher.split(), "-m", "movae_fast", *words, "--exp_dir", f"{folder}/run"]
        said = spoken(command)
    return next((line for line in said.splitlines() if line.startswith("epoch ")), "")


def spoken(command: list[str], **environment: str) -> str:
    """Run a command and return its output (stdout and stderr). Raises RuntimeError with the end of it if it
    fails."""
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
    """Compare the images that the dali loader decodes on the device with those it decodes on the CPU.

    Returns the mean difference as text. Raises NothingToCheckError if DALI is not installed.
    """
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
    """Check reduce-scatter, all-gather and all-reduce among one process per GPU, by nccl, and return a note.

    captured: run them inside a CUDA graph. Raises RuntimeError if a process fails.
    """
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
    """Exchange tensors as process `rank` of the `count` that `exchanged` starts. Raises AssertionError for a
    wrong sum.

    meeting: path of the file by which the processes find each other; kind: "captured" for a CUDA graph, or
    "plain".
    """
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
