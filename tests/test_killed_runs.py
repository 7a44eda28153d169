"""kill -9 at any moment of a run's life, again and again; then the same command: as if it had never happened."""

import importlib.util
import json
import random
import signal
import socket
import time
from collections import Counter

import pytest

from movae_fast.cli.members import expanded
from movae_fast.training import checkpoint
from movae_fast.training.logs import TIMING_KEYS
from tests import lives

COMMON = (
    "--dataset sprites --image_size 16 --limit_train 120 --limit_test 24 --batch_size 20 --epochs 3 --device cpu "
    "--checkpoint_every 4 --save_freq 2 --log_every 2 --num_samples 4 --seed 3"
)
VAE = "--arch vae --hidden_dims 8 8 --latent_dim 4 --agg upgrad"
KINDS = {
    "vae": VAE,
    "vq_vae": "--arch vq_vae --hidden_dims 8 8 --num_embeddings 8 --agg upgrad --flip true",
    "ladder": "--arch provlae --image_size 32 --latent_dim 2 --hidden_dim 4 --epochs 1 --fade_in_duration 3",
    "multi-rate": "--arch vae --hidden_dims 8 8 --latent_dim 4 --multirate true --loader torch --num_workers 1",
    "dali": f"{VAE} --loader dali",
    "two ranks": f"{VAE} --batch_size 10",
}
WITHOUT_DALI = importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None
KILLS = {"slow": 200, "fast": 5}


class Chain:
    """A run in `folder` that is killed and started again."""

    def __init__(self, kind, folder, *flags):
        self.kind, self.folder = kind, folder
        self.words = ["train", *COMMON.split(), *KINDS[kind].split(), *flags, "--exp_dir", folder]
        self.log = folder.with_suffix(".log")
        self.kills = 0

    def start(self, *more, at=None):
        ranks = 2 if self.kind == "two ranks" else 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(ranks):
            environment = {"XDG_CACHE_HOME": str(self.folder.parent / "cache")}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            watched = {} if rank else {"folder": self.folder, "at": at}
            processes.append(lives.start([*self.words, *more], self.log, environment, **watched))
        return processes

    def finish(self, *more):
        """To the end; seconds and operations on files that it took."""
        begun = time.monotonic()
        statuses = lives.wait(self.start(*more))
        assert statuses == [0] * len(statuses), self.log.read_text()[-3000:]
        return time.monotonic() - begun, int(self.log.with_name(f"{self.log.name}.count").read_text())

    def kill(self, after=None, at=None):
        """Start, or go on, and kill after so many seconds or at that operation; whether it was killed."""
        processes = self.start("--resume", "auto", at=at)
        if after is None:
            processes[0].join(120)
        else:
            processes[0].join(after)
        lives.end(processes)
        status = processes[0].exitcode
        assert status in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.kills += status != 0
        last = self.folder / "checkpoints" / "last.pt"
        for path in last.parent.glob("*.pt"):
            checkpoint.load(path)  # whole, whatever the moment
        assert last.exists() or not (self.folder / "config.yaml").exists()
        return status != 0

    def result(self):
        """What an uninterrupted run has too."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        saved = {p.name: checkpoint.load(p) for p in (self.folder / "checkpoints").iterdir()}
        digests = {
            name: {k: checkpoint.digest(v) for k, v in record.items() if k not in ("log", "config")}
            for name, record in saved.items()
        }
        assert expanded([str(self.folder)]) == [self.folder]
        return {
            "metrics": [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines],
            "figures": {p.name: p.read_bytes() for p in (self.folder / "figures").iterdir()},
            "checkpoints": digests,
            "config": (self.folder / "config.yaml").read_text(),
            "files": sorted({p.name for p in self.folder.iterdir()}),
        }


def kill_again_and_again(kind, kills, tmp_path, seed, flags=(), chain_length=4):
    """Chains of up to `chain_length` kills until there were `kills`; counts of what happened."""
    draw, counts = random.Random(f"{kind} {seed}"), Counter()
    lives.ready()
    whole = Chain(kind, tmp_path / "whole", *flags)
    seconds, operations = whole.finish()
    expected = whole.result()
    while counts["kills"] < kills:
        chain = Chain(kind, tmp_path / f"chain{counts['chains']}", *flags)
        counts["chains"] += 1
        length = min(chain_length, kills - counts["kills"])
        while chain.kills < length:
            by_time = draw.random() < 0.5
            moment = {"after": draw.uniform(0, seconds)} if by_time else {"at": draw.randint(1, operations)}
            killed = chain.kill(**moment)
            counts["by time" if by_time else "at an operation"] += killed
            if not killed:
                break
        counts["kills"] += chain.kills
        can_resume = (chain.folder / "checkpoints" / "last.pt").exists()
        counts["before the first checkpoint"] += not can_resume
        if can_resume and draw.random() < 0.5:
            chain.words = ["train"]
            chain.finish("--resume", chain.folder)
        else:
            chain.finish("--resume", "auto")
        found = chain.result()
        for part, value in expected.items():
            assert found[part] == value, f"{kind}: {part} differ after {moment}; {chain.log}"
        assert not list(tmp_path.rglob(".*.tmp")), "a temporary file is left"
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(kind, tmp_path, capsys):
    if kind == "dali" and WITHOUT_DALI:
        pytest.skip("DALI is not installed: pip install 'movae-fast[dali]'")
    kinds = len(KINDS) - WITHOUT_DALI
    counts = kill_again_and_again(kind, -(-KILLS["slow"] // kinds), tmp_path, seed=0)
    with capsys.disabled():
        print(f"\n{kind}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


def test_killed_a_few_times(tmp_path):
    short = ["--epochs", "2", "--save_freq", "0"]
    counts = kill_again_and_again("vae", KILLS["fast"], tmp_path, seed=1, flags=short, chain_length=5)
    assert counts["kills"] == KILLS["fast"]
