"""Small runs of each kind that are killed, starved, started again, and compared with an uninterrupted one."""

import json
import signal
import socket
import time

from movae_fast.training import checkpoint
from movae_fast.training.logs import TIMING_KEYS
from tests import datafiles, lives

COMMON = (
    "--dataset sprites --image_size 16 --limit_train 120 --limit_test 24 --batch_size 20 --epochs 3 "
    "--device cpu --checkpoint_every 4 --save_freq 2 --log_every 2 --num_samples 4 --seed 3"
)
SHORT = ("--epochs", "2", "--save_freq", "0")
VAE = "--arch vae --hidden_dims 8 8 --latent_dim 4 --agg upgrad"
KINDS = {
    "vae": VAE,
    "vq_vae": "--arch vq_vae --hidden_dims 8 8 --num_embeddings 8 --agg upgrad --flip true",
    "ladder": "--arch provlae --image_size 32 --num_ladders 2 --latent_dim 2 --hidden_dim 4 --epochs 1 "
    "--fade_in_duration 3",
    "multi-rate": "--arch vae --hidden_dims 8 8 --latent_dim 4 --multirate true --loader torch --num_workers 1",
    "dali": f"{VAE} --loader dali",
    "two ranks": f"{VAE} --batch_size 10",
}


class Chain:
    """A run in `folder` that is stopped and started again."""

    def __init__(self, kind, folder, *flags):
        # Runs that are compared have one name, which is in the captions of their pictures.
        self.kind, self.folder = kind, folder / "run"
        self.words = ["train", *COMMON.split(), *KINDS[kind].split(), *flags, "--exp_dir", self.folder]
        if kind == "dali":  # which decodes files
            pictures = folder.parent / "pictures"
            for split, count in (("train", 120), ("test", 24)) if not pictures.exists() else ():
                for i in range(count):
                    datafiles.photo(pictures / split / f"{i:03d}.jpg", i)
            self.words += ["--dataset", "folder", "--data_dir", pictures]
        self.log = folder.parent / f"{folder.name}.log"
        self.last = self.folder / "checkpoints" / "last.pt"
        self.kills = 0

    def start(self, *more, at=None, error=0, limits=None):
        ranks = 2 if self.kind == "two ranks" else 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(ranks):
            environment = {"XDG_CACHE_HOME": str(self.log.parent / "cache")}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            fate = None if rank else lives.Fate(str(self.folder), at, error)
            processes.append(lives.start([*self.words, *more], self.log, environment, fate, limits))
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
        processes[0].join(120 if after is None else after)
        lives.end(processes)
        status = processes[0].exitcode
        assert status in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.kills += status != 0
        self.check()
        return status != 0

    def starve(self, **how):
        """Start, or go on, under limits or an error; whether it was refused, in one line and no traceback."""
        before = len(self.log.read_text()) if self.log.exists() else 0
        (status,) = lives.wait(self.start("--resume", "auto", **how))
        said = self.log.read_text()[before:]
        assert "Traceback" not in said, said
        assert status in (0, 2), said[-3000:]
        errors = [line for line in said.splitlines() if line.startswith("movae")]
        assert len(errors) == (status == 2), said
        assert all(len(line) < 620 for line in errors), said
        self.check()
        return errors[0] if errors else ""

    def check(self):
        """What was saved before is whole, whatever the moment."""
        if self.last.parent.exists():
            for path in self.last.parent.glob("*.pt"):
                checkpoint.load(path)
        assert self.last.exists() or not (self.folder / "config.yaml").exists()

    def result(self):
        """What an uninterrupted run has too."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        saved = {p.name: checkpoint.load(p) for p in (self.folder / "checkpoints").iterdir()}
        digests = {
            name: {k: checkpoint.digest(v) for k, v in record.items() if k not in ("log", "config")}
            for name, record in saved.items()
        }
        return {
            "metrics": [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines],
            "figures": {p.name: p.read_bytes() for p in (self.folder / "figures").iterdir()},
            "checkpoints": digests,
            "config": (self.folder / "config.yaml").read_text(),
            "files": sorted(p.name for p in self.folder.iterdir()),
        }


def assert_same(found, expected, where):
    for part, value in expected.items():
        assert found[part] == value, f"{part} differ: {where}"
