"""Whether posteriors collapse on text of known likelihood: the sum, annealing, aggressive training, UPGrad.

    python -m benchmarks.collapse_study run --out study.jsonl --runs runs/collapse  # all ways, three seeds
    python -m benchmarks.collapse_study tables study.jsonl                          # a Markdown table

Each run is `movae train`'s own on `lstm_text`, in a folder of its own below --runs; its steps of the encoder
alone come on top of --steps. One line is appended per run; a run whose line is there is left out, one that was
killed goes on from its checkpoint. The gap is the importance-weighted bound's distance from the true
-log p(x), on the same sentences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from movae_fast.cli import main as movae
from movae_fast.data.text import TextOptions, read_text
from movae_fast.data.text.lstm_text import generating_network
from movae_fast.data.text.vocabulary import SPECIALS
from movae_fast.evaluation.text import importance_weighted_nll, measure_text
from movae_fast.evaluation.text_oracle import true_log_likelihood
from movae_fast.models import LSTMVAE
from movae_fast.training.build import load_model, make_text_loader

FLAGS = "--dataset lstm_text --arch lstm_vae --preset synthetic --lr 0.01 --max_grad_norm 5"
ANNEALED = "--use_kl_annealing --cycle_period 1 --ratio 0.5 --min_kl_weight 0.1"
# What may keep the latents in use: name -> flags. A KL of weight 100 leaves a language model.
WAYS = {
    "language model (KL weight 100)": "--beta 100",
    "sum": "",
    "annealing": ANNEALED,
    "aggressive": "--aggressive {encoder}",
    "aggressive, annealing": f"--aggressive {{encoder}} {ANNEALED}",
    "UPGrad": "--agg upgrad",
    "UPGrad, preference 0.9 for reconstruction": "--agg upgrad --pref_weights 0.9 0.1",
}
DRAWS = 500  # of the importance-weighted bound
SPACING = 0.05  # of the oracle's grid
Job = dict[str, Any]


def jobs(a: argparse.Namespace) -> Iterator[Job]:
    """The runs, those of the first seed first: what a study that is stopped has is then whole."""
    for seed in range(a.seeds):
        for way in WAYS:
            if not a.ways or way in a.ways:
                yield {
                    "way": way,
                    "seed": seed,
                    "steps": a.steps,
                    "batch_size": a.batch_size,
                    "encoder": a.encoder,
                }


def train(job: Job, folder: Path) -> None:
    """Start the run in `folder`, or go on with it."""
    encoder = "--aggressive_steps {} --aggressive_window {}".format(*job["encoder"])
    own = WAYS[job["way"]].format(encoder=encoder)
    words = (
        f"{FLAGS} {own} --seed {job['seed']} --steps {job['steps']} --batch_size {job['batch_size']}".split()
    )
    quiet = "--device cpu --eval_freq 0 --save_freq 0 --checkpoint_every 200 --resume auto".split()
    status = movae(["train", *words, *quiet, "--exp_dir", str(folder)])
    if status:
        raise SystemExit(status)


@torch.no_grad()
def measured(folder: Path, rows: torch.Tensor, oracle: torch.Tensor) -> dict[str, Any]:
    """Metrics of the whole test split, and the bound on the oracle's sentences."""
    config, model = load_model(folder, torch.device("cpu"))
    assert isinstance(model, LSTMVAE)
    config.data.eval_batch_size = 32  # which bounds the mutual information
    loader = make_text_loader(config, torch.device("cpu"), "test")
    metrics = vars(measure_text(model, loader.epoch()))
    nll, _ = importance_weighted_nll(model, loader.take(rows), DRAWS)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken = [line["train/encoder_steps"] for line in lines if "train/encoder_steps" in line]
    gap = nll - oracle
    return metrics | {
        "nll": float(nll.mean()),
        "gap": float(gap.mean()),
        "gap_error": float(gap.std() / len(gap) ** 0.5),
        "encoder_steps": taken[-1] if taken else 0,
    }


def oracle_of(out: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of so many test sentences, and their true -log p(x), of a line of `out` or appended to it."""
    for line in lines_of(out):
        if line.get("sentences") == count:
            return torch.tensor(line["rows"]), torch.tensor(line["oracle"], dtype=torch.float64)
    source = read_text("lstm_text", TextOptions(Path())).test
    rows = torch.linspace(0, len(source) - 1, count).round().long()
    tokens, _ = source.gather(rows)
    began = time.process_time()
    words = tokens[:, 1:-1] - len(SPECIALS)
    nll = -true_log_likelihood(generating_network(), words, fine=SPACING).log_likelihood
    seconds = time.process_time() - began
    append(out, {"sentences": count, "rows": rows.tolist(), "oracle": nll.tolist(), "cpu_seconds": seconds})
    return rows, nll


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def study(a: argparse.Namespace) -> None:
    """Do the runs that `out` does not hold yet."""
    torch.set_num_threads(1)
    rows, oracle = oracle_of(a.out, a.sentences)
    done = [line["job"] for line in lines_of(a.out) if "job" in line]
    for job in jobs(a):
        if job in done:
            continue
        name = "".join(c if c.isalnum() else "-" for c in f"{job['way']} {job['seed']}")
        began = time.process_time()
        train(job, a.runs / name)
        trained = time.process_time()
        found = measured(a.runs / name, rows, oracle) | {"train_cpu_seconds": trained - began}
        append(a.out, {"job": job, **found, "measure_cpu_seconds": time.process_time() - trained})


def tables(path: Path) -> str:
    """A Markdown table: means over seeds, and the standard deviation of the gap over seeds."""
    lines = lines_of(path)
    oracle = statistics.fmean(next(line["oracle"] for line in lines if "oracle" in line))
    head = (
        "way",
        "seeds",
        "KL",
        "mutual information",
        "active units",
        "-ELBO",
        "NLL",
        "gap to the oracle",
        "CPU s",
    )
    text = [f"The oracle's mean -log p(x) is {oracle:.2f} nats.", "", f"| {' | '.join(head)} |"]
    text.append(f"|{'---|' * len(head)}")
    for way in WAYS:
        found = [line for line in lines if line.get("job", {}).get("way") == way]
        if found:
            text.append(f"| {way} | {len(found)} | {' | '.join(cells(found))} |")
    return "\n".join(text) + "\n"


def cells(found: list[dict[str, Any]]) -> list[str]:
    def mean(name: str) -> float:
        return statistics.fmean(line[name] for line in found)

    spread = f" ± {statistics.stdev(line['gap'] for line in found):.2f}" if len(found) > 1 else ""
    return [
        f"{mean('rate'):.3f}",
        f"{mean('mutual_information'):.2f}",
        f"{mean('active_units'):.1f}",
        f"{mean('negative_elbo'):.2f}",
        f"{mean('nll'):.2f}",
        f"{mean('gap'):.2f}{spread}",
        f"{mean('train_cpu_seconds'):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "tables"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("collapse_study.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of the decoder; 1,000 of 16 are an epoch")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--encoder", type=int, nargs=2, default=[6, 3], help="most encoder steps, and the window"
    )
    parser.add_argument(
        "--sentences", type=int, default=30, help="of the test split, for the bound and the oracle"
    )
    parser.add_argument("--ways", nargs="*", help="only these")
    a = parser.parse_args()
    if a.what == "tables":
        print(tables(a.file or a.out))
    else:
        study(a)


if __name__ == "__main__":
    main()
