"""Which images two gloo ranks train and test on, through torchrun and the DALI loader; and after a resume."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from movae_fast.cli import main
from movae_fast.data import DaliLoader
from tests.datafiles import shard

N_TRAIN, N_TEST, BATCH = 53, 11, 4  # two ranks: six steps an epoch, five images left out; three test batches


@pytest.fixture
def shards(tmp_path):
    """Tars in which image number i has class i and grey level 4 i."""
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        files = {}
        for i in range(n):
            picture = tmp_path / "one.png"
            Image.fromarray(np.full((8, 8), 4 * i, np.uint8)).save(picture)
            files |= {f"{i}.png": picture.read_bytes(), f"{i}.cls": b"%d" % i}
        shard(tmp_path / "shards" / split / "0.tar", files)
    return tmp_path / "shards"


def watch(monkeypatch, said):
    """Have DALI's loader tell `said(split, epoch, batch, numbers)` what it gives; grey levels must fit."""
    original = DaliLoader.epoch

    def epoch(self, number=0, start=0):
        said("train" if self.train else "test", number, "begin", [])
        for at, (x, y) in enumerate(original(self, number, start), start):
            assert (x.mean((1, 2, 3)) * 255 / 4).round().int().tolist() == y.tolist()
            said("train" if self.train else "test", number, at, y.tolist())
            yield x, y

    monkeypatch.setattr(DaliLoader, "epoch", epoch)


# Each rank runs the command lines of the file one after another: a process that starts costs seconds.
RANK = """
import os, shlex, sys
import pytest
from pathlib import Path
from movae_fast.cli import main
from tests.test_data_ranks import watch
for number, line in enumerate(Path(sys.argv[1]).read_text().splitlines()):
    path = f"{sys.argv[1]}.{number}.{os.environ['RANK']}"
    with open(path, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
        watch(patch, lambda *words: print(*words[:3], *words[3], file=file, flush=True))
        status = main(shlex.split(line))
        if status:
            sys.exit(status)
"""


def seen(path):
    """Of each pass over a split what it gave: [(split, epoch, {batch: numbers})]."""
    passes = []
    for line in Path(path).read_text().splitlines():
        split, epoch, batch, *numbers = line.split()
        if batch == "begin":
            passes.append((split, int(epoch), {}))
        else:
            passes[-1][2][int(batch)] = [int(v) for v in numbers]
    return passes


def trained(path):
    return {
        (epoch, batch): numbers
        for split, epoch, batches in seen(path)
        if split == "train"
        for batch, numbers in batches.items()
    }


@pytest.fixture
def commands(tmp_path, shards):
    """A file of command lines: two epochs; nine of their twelve steps and then the rest; the nine alone."""
    common = f"train --dataset folder --data_dir {shards} --loader dali --num_workers 1 --image_size 16 "
    common += f"--latent_dim 2 --hidden_dims 4 4 --batch_size {BATCH} --log_every 1 --seed 3 --device cpu "
    common += "--num_samples 2 --limit_train 0 --limit_test 0"
    lines = [f"{common} --epochs 2 --exp_dir {tmp_path / 'whole'}"]
    lines += [f"{common} --steps 9 --exp_dir {tmp_path / 'part'}"]
    lines += [f"train --resume {tmp_path / 'part'} --steps 12"]
    lines += [f"{common} --steps 9 --exp_dir {tmp_path / 'alone'}"]
    path = tmp_path / "commands"
    path.write_text("\n".join(lines))
    return path


def test_two_ranks_by_dali_share_every_image_and_resume_in_mid_epoch(
    tmp_path, commands, own_cache, monkeypatch
):
    pytest.importorskip("nvidia.dali")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*torchrun, script, commands], env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    whole, part, rest = ([trained(f"{commands}.{run}.{r}") for r in range(2)] for run in range(3))
    assert all(len(rank) == 12 for rank in whole)
    epochs = [[i for rank in whole for at, v in rank.items() if at[0] == n for i in v] for n in range(2)]
    for images in epochs:
        assert len(images) == len(set(images)) == 48  # of 53 images, eight a step
    assert set(epochs[0]) | set(epochs[1]) > set(epochs[0])  # the second leaves out others
    for r in range(2):
        assert len(part[r]) == 9
        assert sorted(rest[r]) == [(1, 3), (1, 4), (1, 5)]
        assert part[r] | rest[r] == whole[r]

    tests = [[p for run in range(3) for p in seen(f"{commands}.{run}.{r}") if p[0] == "test"] for r in range(2)]
    assert len(tests[0]) == len(tests[1]) >= 4
    for both in zip(*tests, strict=True):
        images = [i for _, _, batches in both for numbers in batches.values() for i in numbers]
        assert sorted(images) == list(range(N_TEST))

    # One process goes on where two were in the middle of an epoch: with the images of both in each step.
    one = {}
    watch(monkeypatch, lambda split, epoch, at, numbers: one.update({(split, epoch, at): numbers}))
    monkeypatch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
    assert main(["train", "--resume", str(tmp_path / "alone"), "--steps", "12"]) == 0
    for at in (3, 4, 5):
        assert one["train", 1, at] == whole[0][1, at] + whole[1][1, at]
    assert ("train", 1, 2) not in one
