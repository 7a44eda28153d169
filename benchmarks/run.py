"""Run all benchmarks for `make bench`, and keep results/<machine>.json with a Markdown table beside it.

Each benchmark file runs in a process of its own, and its rows are written as soon as it ends. An interrupted
run continues with the files that were not run at this commit (`--again` runs them all). Rows carry the machine,
commit, versions and date, and the 20th, 50th and 80th percentile of the timings. Arguments go to pytest:
`python -m benchmarks.run benchmarks/bench_gramian.py`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from movae_fast.files import replacing

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def machine() -> str:
    """Return the machine's name for its results file: the GPU, or else the CPU and its cores.

    The environment's MOVAE_MACHINE overrides it.
    """
    name = os.environ.get("MOVAE_MACHINE")
    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    if name is None:
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = f"{model.group(1) if model else platform.processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(arguments: list[str]) -> dict[str, Any] | None:
    """Return the JSON report of one pytest-benchmark run, or None if a benchmark failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", f"--benchmark-json={report}"]
        options = ["-p", "no:cacheprovider", "-o", "python_files=bench_*.py"]
        status = subprocess.run([*command, *options, *arguments], check=False).returncode
        return json.loads(report.read_text()) if status == 0 else None


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per benchmark: group, name, milliseconds at p20/p50/p80, rounds, and what the benchmark
    adds."""
    found = []
    for benchmark in report["benchmarks"]:
        times = np.asarray(benchmark["stats"]["data"]) * 1e3
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        row = {"group": benchmark["group"] or benchmark["fullname"].split("::")[0], "name": benchmark["name"]}
        row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "rounds": len(times)}
        found.append(row | benchmark["extra_info"])
    return found


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown, with one table per group."""
    lines = [f"# {result['machine']}", "", f"{result['versions']}, {result['threads']} threads"]
    if "note" in result:
        lines += ["", result["note"]]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        members = [row for row in result["rows"] if row["group"] == group]
        extra = [k for k in dict.fromkeys(k for row in members for k in row) if k not in FIXED]
        compared = [k for k in extra if any(isinstance(row.get(k), dict) for row in members)]
        extra = [k for k in extra if k not in compared]
        head = ["name", "p20 ms", "p50 ms", "p80 ms", *extra]
        stamp = f"{members[0]['date']}, commit {members[0]['commit'][:10]}"
        lines += ["", f"## {group}", "", stamp, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in sorted(members, key=lambda r: r["p50_ms"] or 0.0):
            times = [_show(row[k]) for k in ("p20_ms", "p50_ms", "p80_ms")]
            values = [_show(row.get(k)) for k in extra]
            lines.append(f"| {' | '.join([row['name'], *times, *values])} |")
        for row in members:
            lines += comparison({k: row[k] for k in compared if row.get(k)})
    return "\n".join(lines) + "\n"


def comparison(columns: dict[str, dict[str, Any]]) -> list[str]:
    """Return Markdown lines with a table of peers that one test ran in turn: a line per peer, a column per
    figure."""
    flat: dict[str, dict[str, Any]] = {}
    for column, values in columns.items():
        for peer, value in values.items():
            cells = value if isinstance(value, dict) else {column: value}
            flat.setdefault(peer, {}).update(cells)
    if not flat:
        return []
    head = list(dict.fromkeys(k for cells in flat.values() for k in cells))
    lines = ["", f"| interleaved | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    return lines + [f"| {peer} | {' | '.join(_show(c.get(k)) for k in head)} |" for peer, c in flat.items()]


# Columns that every table has, or that are the same all over it.
FIXED = ("group", "name", "p20_ms", "p50_ms", "p80_ms", "rounds", "commit", "date")


def _show(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    """Return the checkout's commit, followed by "+" if files differ from it.

    The environment's MOVAE_COMMIT names the commit of a copy that has no git history.
    """
    if "MOVAE_COMMIT" in os.environ:
        return os.environ["MOVAE_COMMIT"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def git(*arguments: str) -> str:
    """Return what a git command prints about this checkout."""
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, cwd=HERE.parent)
    return done.stdout.strip()


def merge(report: dict[str, Any], suite: str | None) -> None:
    """Write the report's rows into the machine's file: a group measured again replaces its old rows.

    `suite` is the name of a benchmark file that the report covers whole; the machine's file then holds the
    commit at which that was done.
    """
    stamp = {"commit": commit(), "date": datetime.date.today().isoformat()}
    names = ("torch", "triton", "torchjd", "numpy")
    fresh = [row | stamp for row in rows(report)]
    old = results()
    measured = {row["group"] for row in fresh}
    result = {
        "machine": machine(),
        "versions": ", ".join(f"{n} {version(n)}" for n in names),
        "threads": torch.get_num_threads(),
        "whole": old.get("whole", {}) | ({suite: stamp["commit"]} if suite else {}),
        "rows": [row for row in old.get("rows", []) if row["group"] not in measured] + fresh,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.json"
    for file, text in ((path, json.dumps(result, indent=1) + "\n"), (path.with_suffix(".md"), table(result))):
        with replacing(file) as out:
            out.write(text.encode())
    print(f"{path}\n{path.with_suffix('.md')}")


def results() -> dict[str, Any]:
    """Return the content of the machine's results file, or {} if there is none."""
    path = RESULTS / f"{machine()}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_suites(suites: list[Path], again: bool) -> list[str]:
    """Run benchmark files, each in a process of its own; return the names of those that failed.

    Each file's rows are written as soon as it ends. A file that was run whole at this commit is left out,
    unless `again`, so an interrupted run goes on where it stopped.
    """
    failed = []
    for number, suite in enumerate(suites, 1):
        print(f"[{number}/{len(suites)}] {suite.name}", flush=True)
        if not (again or commit().endswith("+")) and results().get("whole", {}).get(suite.name) == commit():
            print("was run at this commit; --again runs it once more")
            continue
        report = measure([str(suite)])
        if report is None:
            failed.append(suite.name)
        else:
            merge(report, suite.name)
    return failed


def main(arguments: list[str]) -> None:
    """Run all benchmark files, or those that the arguments (pytest's) select."""
    if [a for a in arguments if a != "--again"]:
        report = measure(arguments)
        if report is None:
            raise SystemExit("a benchmark failed; nothing was written")
        merge(report, None)
        return
    failed = run_suites(sorted(HERE.glob("bench_*.py")), again="--again" in arguments)
    if failed:
        raise SystemExit(f"failed, without rows: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
