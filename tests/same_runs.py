"""Compare the runs of two checkouts: the same commands must write the same metrics, bit for bit.

    python -m tests.same_runs --before ../old-checkout [--only NAME ...]

For changes of structure. Both checkouts run on this machine, one after the other, with one thread each; figures
of time and memory are left out of the comparison. Status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from movae_fast.training.logs import read_lines

HERE = Path(__file__).resolve().parent.parent
SMALL = (
    "--dataset sprites --image_size 32 --batch_size 16 --limit_train 128 --limit_test 32 --log_every 2 "
    "--hidden_dims 8 16 --seed 5 --device cpu --steps 8"
)
VAE = f"{SMALL} --arch vae --latent_dim 4"
TC = f"{SMALL} --arch betatc_vae --latent_dim 4"
VQ = f"{SMALL} --arch vq_vae --num_embeddings 32 --embedding_dim 8"
MMD = (
    "--dataset sprites --arch mmd_vae --image_size 32 --batch_size 16 --limit_train 64 --limit_test 32 "
    "--log_every 2 --latent_dim 4 --dim 8 --seed 5 --device cpu --steps 4"
)
LADDER = (
    "--dataset sprites --image_size 32 --batch_size 16 --limit_train 128 --limit_test 32 --log_every 2 "
    "--arch provlae --hidden_dim 8 --fc_dim 16 --latent_dim 2 --seed 5 --device cpu --steps 5 --mode seq_train "
    "--fade_in_duration 3"
)
DENSE = (
    "--dataset digits --batch_size 16 --limit_train 128 --limit_test 32 --log_every 2 --seed 5 --device cpu "
    "--steps 8"
)
# Name -> (flags, number of processes).
RUNS: dict[str, tuple[str, int]] = {
    "vae upgrad": (f"{VAE} --agg upgrad", 1),
    "vae sum bf16": (f"{VAE} --agg sum --precision bf16", 1),
    "betatc_vae aligned_mtl adamw": (f"{TC} --agg aligned_mtl --optimizer adamw", 1),
    "mmd_vae torchjd": (f"{MMD} --agg graddrop", 1),
    "vq_vae upgrad accumulate": (
        f"{VQ} --accumulate 2 --agg upgrad",
        1,
    ),
    "vq_vae step projected": (
        f"{VQ} --agg sum --conflict_free step",
        1,
    ),
    "vae gramian_every fp16": (f"{VAE} --agg upgrad --gramian_every 3 --precision fp16", 1),
    "vae gramian_at features": (
        f"{VAE} --agg upgrad --gramian_at features --kl_annealing monotonic",
        1,
    ),
    "provlae ladder": (f"{LADDER} --agg upgrad", 1),
    "multi-rate": (f"{DENSE} --arch mlp_vae --multirate true --agg upgrad", 1),
    "multi-rate conv, a part of the batch": (
        f"{VAE} --multirate true --agg upgrad --gramian_batch 0.5 --kl_annealing cyclic",
        1,
    ),
    "multi-rate, two processes": (f"{DENSE} --arch mlp_vae --multirate true --agg upgrad", 2),
    "mmd_vae accumulate": (f"{MMD} --agg upgrad --accumulate 2", 1),
    "ladder capacity": (
        f"{LADDER} --agg upgrad --use_kl_annealing true --use_capacity_increase true --capacity_max_iter 6 "
        "--pre_kl true --scheduler cosine --warmup_steps 2",
        1,
    ),
    "torch loader": (f"{VAE} --agg upgrad --loader torch --num_workers 1", 1),
    "two processes": (f"{VAE} --agg upgrad", 2),
    "resume": (f"{VAE} --agg upgrad --checkpoint_every 3", 1),
}
# Of time and memory, which no two runs share.
TIMED = ("images_per_s", "data_wait_share", "step_ms", "peak_memory", "seconds")


def trained(checkout: Path, flags: str, processes: int, folder: Path) -> list[dict[str, float]]:
    """Train by the code of a checkout; return its log without figures of time."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    launcher = ["-m"]
    if processes > 1:
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes} -m".split()
    commands = [["train", *flags.split(), "--exp_dir", str(folder)]]
    if "--checkpoint_every" in flags:
        short = flags.replace("--steps 8", "--steps 4")
        commands = [["train", *short.split(), "--exp_dir", str(folder)]]
        commands += [["train", "--resume", str(folder), "--steps", "8"]]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *launcher, "movae_fast", *command],
            env=environment,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(
                f"{checkout}: {' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}"
            )
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not any(name in k for name in TIMED)} for line in lines]


def difference(before: Path, after: Path, name: str) -> str:
    """Return what differs between a run's two logs; empty if nothing."""
    flags, processes = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        logs = [trained(c, flags, processes, Path(folder) / str(i)) for i, c in enumerate((before, after))]
    if not logs[0]:
        return "no lines"
    if len(logs[0]) != len(logs[1]):
        return f"{len(logs[0])} lines, then {len(logs[1])}"
    for number, (old, new) in enumerate(zip(*logs, strict=True), 1):
        for key in sorted(old.keys() | new.keys()):
            if json.dumps(old.get(key)) != json.dumps(new.get(key)):
                return f"line {number}: {key}: {old.get(key)}, then {new.get(key)}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout, with its extension compiled")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    differs = False
    for name in arguments.only:
        said = difference(arguments.before.resolve(), HERE, name)
        differs = differs or bool(said)
        print(f"{name}: {said or 'the same'}", flush=True)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
