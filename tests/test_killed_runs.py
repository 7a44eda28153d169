"""kill -9 at any moment of a run's life, again and again; then the same command: as if nothing had happened."""

import errno
import importlib.util
import random
from collections import Counter

import pytest

from tests import lives
from tests.chains import KINDS, SHORT, Chain, assert_same

WITHOUT_DALI = importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None
KILLS = 200  # over the kinds that this machine has


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
            counts["before the first checkpoint"] += killed and not chain.last.exists()
            if not killed:
                break
        counts["kills"] += chain.kills
        if chain.last.exists() and draw.random() < 0.5:
            chain.words = ["train"]
            chain.finish("--resume", chain.folder)
        else:
            chain.finish("--resume", "auto")
        assert_same(chain.result(), expected, f"{kind}, {moment}, {chain.log}")
        assert not list(tmp_path.rglob(".*.tmp")), "a temporary file is left"
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again(kind, tmp_path, capsys):
    if kind == "dali" and WITHOUT_DALI:
        pytest.skip("DALI is not installed: pip install 'movae-fast[dali]'")
    counts = kill_again_and_again(kind, -(-KILLS // (len(KINDS) - WITHOUT_DALI)), tmp_path, seed=0)
    with capsys.disabled():
        print(f"\n{kind}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


def test_killed_and_out_of_disk_a_few_times(tmp_path):
    lives.ready()
    whole, chain = (Chain("vae", tmp_path / name, *SHORT) for name in ("whole", "chain"))
    _, operations = whole.finish()
    assert chain.kill(at=operations // 8)
    said = chain.starve(at=operations // 4, error=errno.ENOSPC)
    assert f"{chain.folder}/" in said
    assert "No space left on device" in said
    assert chain.kill(at=operations // 3)
    chain.finish("--resume", "auto")
    assert_same(chain.result(), whole.result(), chain.log)
    assert not list(tmp_path.rglob(".*.tmp"))
