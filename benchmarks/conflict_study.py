"""What strict aggregation and the projected step do: shares of steps in conflict, and what training reaches.

    python -m benchmarks.conflict_study applied --out results.jsonl   # 300 steps of every model and optimizer
    python -m benchmarks.conflict_study gradient --out results.jsonl  # strict UPGrad at two learning rates
    python -m benchmarks.conflict_study training --out results.jsonl  # epochs on Fashion-MNIST, three seeds
    python -m benchmarks.conflict_study tables results.jsonl          # Markdown tables of the lines there are

Each run is the trainer's own (`assemble`), its cosines those of its log, taken at every step of `applied`. One
line is appended per run; a run whose line is there is left out, so an interrupted study goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.cuda_graph import CudaGraphs
from movae_fast.training.device import resolve_device
from movae_fast.training.evaluate import evaluate
from movae_fast.training.run import Run
from movae_fast.training.start import assemble
from movae_fast.training.telemetry import CONFLICT
from movae_fast.training.world import World

ARCHS = ("vae", "betatc_vae", "vq_vae", "mmd_vae", "provlae")
SETS = ("fashion_mnist", "sprites")
TORCHJD = {"upgrad_regularizer": "trace", "upgrad_norm_eps": 1e-4, "upgrad_reg_eps": 1e-4}
# Ways to aggregate, with and without a guarantee against conflicts: name -> flags.
WAYS: dict[str, dict[str, Any]] = {
    "sum": {"agg": "sum"},
    "TorchJD's UPGrad": {"agg": "upgrad", **TORCHJD},
    "strict UPGrad": {"agg": "upgrad"},
    "AlignedMTL": {"agg": "aligned_mtl"},
    "sum, step projected": {"agg": "sum", "conflict_free": "step"},
    "strict UPGrad, step projected": {"agg": "upgrad", "conflict_free": "step"},
    "sum, step projected in the optimizer's metric": {
        "agg": "sum",
        "conflict_free": "step",
        "step_metric": "optimizer",
    },
    "strict UPGrad, step projected in the optimizer's metric": {
        "agg": "upgrad",
        "conflict_free": "step",
        "step_metric": "optimizer",
    },
}
Job = dict[str, Any]


def job(arch: str, dataset: str, way: str, seed: int, **others: Any) -> Job:
    """Return the description of one run: what is trained, how conflicts are avoided (`way`), and for how
    long."""
    return {"arch": arch, "dataset": dataset, "way": way, "seed": seed, "optimizer": "adam"} | others


def applied_jobs(seeds: int, steps: int) -> Iterator[Job]:
    """Yield short runs of every model, dataset and optimizer; ways without a projected step only with adam."""
    short = {"steps": steps, "batch_size": 64, "diagnose": 1}
    for seed, dataset, arch in itertools.product(range(seeds), SETS, ARCHS):
        for optimizer, (way, flags) in itertools.product(("adam", "adamw", "sgd", "lamb"), WAYS.items()):
            projected = flags.get("conflict_free") == "step"
            if way in ("TorchJD's UPGrad", "AlignedMTL") or (optimizer != "adam" and not projected):
                continue
            if flags.get("step_metric") == "optimizer" and optimizer != "adam":
                continue
            lr = 1e-2 if optimizer == "sgd" else 1e-4
            yield job(arch, dataset, way, seed, optimizer=optimizer, lr=lr, **short)


def gradient_jobs(steps: int) -> Iterator[Job]:
    """Yield short runs of strict UPGrad at two learning rates, with the gradient's cosines measured at every
    step."""
    short = {"steps": steps, "batch_size": 64, "diagnose": 1}
    for arch, dataset, lr in itertools.product(ARCHS, SETS, (1e-3, 1e-4)):
        yield job(arch, dataset, "strict UPGrad", 0, lr=lr, **short)


def training_jobs(seeds: int, epochs: int, precision: str) -> Iterator[Job]:
    """Yield longer runs on Fashion-MNIST that show what training reaches in each way."""
    ways = ("sum", "TorchJD's UPGrad", "strict UPGrad", "AlignedMTL")
    ways += ("sum, step projected", "sum, step projected in the optimizer's metric")
    long = {"epochs": epochs, "batch_size": 128, "diagnose": 20, "precision": precision}
    for seed, way, arch in itertools.product(range(seeds), ways, ("vae", "vq_vae", "betatc_vae")):
        yield job(arch, "fashion_mnist", way, seed, lr=1e-3, **long)


def by_seed(jobs: list[Job]) -> list[Job]:
    """Sort the jobs by seed, so that a study that is stopped early has complete results for the first seeds."""
    return sorted(jobs, key=lambda todo: todo["seed"])


def set_up(job: Job, device: str, data_dir: str) -> Run:
    """Set up the trainer's run for a job on the device."""
    flags = {k: job[k] for k in ("arch", "dataset", "optimizer", "lr", "seed", "batch_size")}
    flags |= WAYS[job["way"]] | {"image_size": 32, "data_dir": data_dir, "device": device, "compile": "off"}
    flags |= {"on_cudnn_benchmark": False, "precision": job.get("precision", "fp32")}
    flags |= {"download": False, "loader": "resident", "limit_test": 0 if "epochs" in job else 2000}
    if job["arch"] == "betatc_vae" and "epochs" in job:
        flags["recons_reduction"] = "sum"
    if job["arch"] == "provlae":
        flags |= {"fade_in_duration": 100}
    if "steps" in job:
        stages = 3 if job["arch"] == "provlae" else 1
        flags["steps"] = job["steps"] // stages
    flags["epochs"] = job.get("epochs", 1)
    config = TrainConfig.from_flat(flags)
    validate(config)
    return assemble(config, resolve_device(device), World())


def trained(job: Job, device: str, data_dir: str, graphs: bool) -> Generator[None, None, dict[str, Any]]:
    """Train a job, yielding after each step; return the job's figures at the end.

    They are the shares of measured steps whose gradient and whose applied step conflict, and the test metrics.
    """
    began = time.perf_counter()
    run = set_up(job, device, data_dir)
    if graphs and run.config.optimizer.optimizer != "lamb":
        run.train_step.recordings.recorder = CudaGraphs(run.device)
        run.train_step.prepare_optimizer()
    gradient, applied, losses = [], [], []
    run.model.train()
    while not run.finished:
        for x, _ in run.train_loader.epoch(run.epoch):
            run.begin_step()
            diagnose = run.step % job["diagnose"] == 0
            record = run.train_step(x, run.step, run.noise(len(x)), diagnose)
            run.scheduler.step()
            run.step += 1
            if diagnose:
                # A replay overwrites its record.
                gradient.append(record.cosines.clone())
                applied.append(record.step_cosines.clone())
                losses.append(record.losses.clone())
            yield
            if run.finished:
                break
        run.epoch += 1
    found: dict[str, Any] = {}
    for name, cosines in (("gradient", gradient), ("step", applied)):
        least = torch.stack(cosines).cpu().nan_to_num(math.inf).amin(1)
        share = float((least < CONFLICT).double().mean())
        found |= {f"{name}_conflict": share, f"{name}_worst": float(least.min())}
    found["final_losses"] = torch.stack(losses)[-20:].mean(0).tolist()
    figures = evaluate(run.model, run.losses, run.test_loader, 0)
    return found | figures | {"measured_steps": len(gradient), "seconds": time.perf_counter() - began}


def key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


def work(jobs: Any, results: Any, slots: int, threads: int, *where: Any) -> None:
    """Run jobs from a queue until it is empty, `slots` of them concurrently, on a GPU each in its own
    stream."""
    torch.set_num_threads(threads)
    on_gpu = where[0].startswith("cuda")
    side_by_side: list[tuple[Job, Any, Any]] = []
    more = True
    while more or side_by_side:
        while more and len(side_by_side) < slots:
            todo = jobs.get()
            more = todo is not None
            if more:
                stream = torch.cuda.Stream() if on_gpu else None
                side_by_side.append((todo, stream, trained(todo, *where)))
        for entry in list(side_by_side):
            todo, stream, steps = entry
            try:
                with torch.cuda.stream(stream):
                    next(steps)
                continue
            except StopIteration as end:
                results.put({"job": todo, **end.value})
            except Exception as error:  # one run's failure is a line of the study, not its end
                results.put({"job": todo, "error": f"{type(error).__name__}: {error}"})
            side_by_side.remove(entry)
    results.put(None)


def study(jobs: Iterable[Job], out: Path, workers: int, slots: int, limit: float, *where: Any) -> None:
    """Run in `workers` processes the jobs whose results `out` does not hold yet, for at most `limit`
    seconds."""
    began = time.perf_counter()
    done = {key(json.loads(line)["job"]) for line in out.read_text().splitlines()} if out.exists() else set()
    left = [todo for todo in jobs if key(todo) not in done]
    print(f"{len(left)} runs to do, {len(done)} done", flush=True)
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for todo in [*left, *[None] * workers]:
        waiting.put(todo)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    arguments = (waiting, results, slots, threads, *where)
    processes = [context.Process(target=work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    number, working = 0, workers
    with out.open("a") as file:
        while working:
            try:
                line = results.get(timeout=max(0.1, limit - (time.perf_counter() - began)))
            except queue.Empty:
                print(f"stopped after {limit:.0f} s with {number} of {len(left)} runs", flush=True)
                break
            if line is None:
                working -= 1
                continue
            number += 1
            file.write(json.dumps(line) + "\n")
            file.flush()
            said = line.get("error")
            if said is None:
                said = f"gradient {line['gradient_conflict']:.0%}, step {line['step_conflict']:.0%}"
            name = " ".join(str(line["job"][k]) for k in ("arch", "dataset", "optimizer", "lr", "seed", "way"))
            print(f"{number}/{len(left)} {name}: {said}", flush=True)
    for process in processes:
        process.kill() if working else process.join()


def percent(values: list[float], worst: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.0f} % ({min(worst):+.4f})"


def tables(paths: list[Path]) -> str:
    """Return the results as Markdown: a table of the short runs and one of the longer ones."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    lines = [line for line in lines if "error" not in line]
    text = []
    for length, by in (("steps", ("arch", "dataset", "optimizer", "lr", "way")), ("epochs", ("arch", "way"))):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for line in lines:
            if length in line["job"]:
                groups.setdefault(tuple(line["job"][k] for k in by), []).append(line)
        head = [*by, "seeds", "gradient in conflict (worst)", "applied step (worst)", "test MSE", "rate"]
        if groups:
            text += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for names, found in sorted(groups.items()):
            cells = [*map(str, names), *cells_of(found)]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def cells_of(found: list[dict[str, Any]]) -> list[str]:
    """Return a group's cells of the table: runs, conflicts of gradients and of steps, test error, rate."""
    if not all(math.isfinite(loss) for f in found for loss in f["final_losses"]):
        return [str(len(found)), "diverged", "diverged", "–", "–"]  # NaN cosines would count as no conflict
    error = [f["test/mse"] for f in found]
    spread = f" ± {statistics.stdev(error):.5f}" if len(error) > 1 else ""
    return [
        str(len(found)),
        percent([f["gradient_conflict"] for f in found], [f["gradient_worst"] for f in found]),
        percent([f["step_conflict"] for f in found], [f["step_worst"] for f in found]),
        f"{statistics.fmean(error):.5f}{spread}",
        rate(found),
    ]


def rate(found: list[dict[str, Any]]) -> str:
    """Return the mean rate in nats per image as text, or for a model with a codebook its perplexity."""
    if "test/perplexity" in found[0]:
        return f"perplexity {statistics.fmean(f['test/perplexity'] for f in found):.1f}"
    names = [n for n in found[0] if n.startswith("test/kl") or n in ("test/mi", "test/tc", "test/dwkl")]
    return f"{statistics.fmean(sum(f[n] for n in names) for f in found):.2f} nats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["applied", "gradient", "training", "all", "tables"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path("conflict_study.jsonl"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, default=1, help="runs side by side in each worker, for a GPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", default="fp32", help="of the training runs")
    parser.add_argument("--graphs", action="store_true", help="one CUDA graph per step")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds after which no more runs are begun")
    parser.add_argument("--archs", nargs="*", help="only these models")
    a = parser.parse_args()
    if a.what == "tables":
        print(tables(a.files or [a.out]))
        return
    jobs = {
        "applied": lambda: applied_jobs(a.seeds, a.steps),
        "gradient": lambda: gradient_jobs(a.steps),
        "training": lambda: training_jobs(a.seeds, a.epochs, a.precision),
        "all": lambda: by_seed(
            [*training_jobs(a.seeds, a.epochs, a.precision), *applied_jobs(a.seeds, a.steps)]
        ),
    }[a.what]()
    jobs = (todo for todo in jobs if not a.archs or todo["arch"] in a.archs)
    study(jobs, a.out, a.workers, a.slots, a.limit, a.device, a.data_dir, a.graphs)


if __name__ == "__main__":
    main()
