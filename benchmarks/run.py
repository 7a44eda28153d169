"""`make bench`: every benchmark in one run, kept as results/<machine>.json with a Markdown table beside it.

Rows carry the machine, commit, versions and date, and the 20th, 50th and 80th percentile of the timings.
Arguments go to pytest: `python -m benchmarks.run benchmarks/bench_gramian.py`.
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

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def machine() -> str:
    """The file's name: the GPU if there is one, else the CPU and its cores; MOVAE_MACHINE overrides it."""
    name = os.environ.get("MOVAE_MACHINE")
    if name is None and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    if name is None:
        model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = f"{model.group(1) if model else platform.processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run pytest-benchmark; its JSON report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", f"--benchmark-json={report}"]
        targets = arguments or [str(HERE)]
        subprocess.run(
            [*command, "-p", "no:cacheprovider", "-o", "python_files=bench_*.py", *targets], check=True
        )
        return json.loads(report.read_text())


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a benchmark: group, name, milliseconds at p20/p50/p80, rounds, and what it adds itself."""
    found = []
    for benchmark in report["benchmarks"]:
        times = np.asarray(benchmark["stats"]["data"]) * 1e3
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        row = {"group": benchmark["group"] or benchmark["fullname"].split("::")[0], "name": benchmark["name"]}
        row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "rounds": len(times)}
        found.append(row | benchmark["extra_info"])
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, one table a group."""
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
    """A table of peers that were interleaved in one test: one line a peer, one column a figure."""
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
    """The checkout's commit; MOVAE_COMMIT names it for a copy without its history."""
    if "MOVAE_COMMIT" in os.environ:
        return os.environ["MOVAE_COMMIT"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True, cwd=HERE)
    return git.stdout.strip()


def main(arguments: list[str]) -> None:
    """Measure, then merge into the machine's file: a group measured again replaces its old rows."""
    report = measure(arguments)
    stamp = {"commit": commit(), "date": datetime.date.today().isoformat()}
    names = ("torch", "triton", "torchjd", "numpy")
    path = RESULTS / f"{machine()}.json"
    fresh = [row | stamp for row in rows(report)]
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = {row["group"] for row in fresh}
    result = {
        "machine": machine(),
        "versions": ", ".join(f"{n} {version(n)}" for n in names),
        "threads": torch.get_num_threads(),
        "rows": [row for row in old if row["group"] not in measured] + fresh,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    print(f"{path}\n{path.with_suffix('.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
