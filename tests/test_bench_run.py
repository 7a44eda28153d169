"""`make bench`: each suite's rows are kept as soon as it ends, and a run goes on where it stopped."""

import json

import pytest

from benchmarks import run


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Put three suites into a folder, the second of which fails; return the names of those that ran."""
    ran = []

    def measure(arguments):
        (name,) = [argument.rsplit("/", 1)[-1] for argument in arguments]
        ran.append(name)
        if name == "bench_b.py":
            return None
        stats = {"data": [0.001, 0.002, 0.003]}
        row = {"group": name, "name": "test", "fullname": name, "stats": stats, "extra_info": {"peer": 2.0}}
        return {"benchmarks": [row]}

    for name in "abc":
        (tmp_path / f"bench_{name}.py").touch()
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setenv("MOVAE_MACHINE", "a machine")
    monkeypatch.setenv("MOVAE_COMMIT", "one")
    return ran


def test_a_suite_that_fails_is_named_and_costs_the_others_nothing(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"failed.*bench_b\.py"):
        run.main([])
    assert bench == ["bench_a.py", "bench_b.py", "bench_c.py"]
    kept = json.loads((tmp_path / "results/a-machine.json").read_text())
    assert [row["group"] for row in kept["rows"]] == ["bench_a.py", "bench_c.py"]
    assert [row["p50_ms"] for row in kept["rows"]] == [2.0, 2.0]
    assert "| test | 1.4 | 2 | 2.6 | 2 |" in (tmp_path / "results/a-machine.md").read_text()


def test_goes_on_with_the_suites_that_were_not_run_at_this_commit(bench, monkeypatch):
    for _ in range(2):
        with pytest.raises(SystemExit):
            run.main([])
    assert bench[3:] == ["bench_b.py"]
    with pytest.raises(SystemExit):
        run.main(["--again"])
    assert bench[4:] == ["bench_a.py", "bench_b.py", "bench_c.py"]
    for changed in ("two", "one+"):
        monkeypatch.setenv("MOVAE_COMMIT", changed)
        del bench[:]
        with pytest.raises(SystemExit):
            run.main([])
        assert len(bench) == 3


def test_a_suite_by_itself_is_measured_again(bench, tmp_path):
    (tmp_path / "bench_b.py").unlink()
    run.main([])
    run.main(["bench_a.py"])
    assert bench == ["bench_a.py", "bench_c.py", "bench_a.py"]
    with pytest.raises(SystemExit, match="nothing was written"):
        run.main(["bench_b.py"])
