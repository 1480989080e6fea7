#!/usr/bin/env python3
"""One trace under several placement policies, on the same hardware: `bench_serve.py` once a policy and round, in turns.

    bench_policies.py static elastic --trace long.jsonl --instances 3 --device cpu --kv-tokens 2048

A policy may have roles behind it: `split:prefill,decode,decode`. All other arguments are bench_serve's. The first policy is
what the others are compared with; each figure is the median over the rounds.

Exit code 0, or that of the first bench_serve that could not measure.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _measure import facts, show
from _setup import ROOT

TIMES = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "itl_p50_s", "itl_p99_s", "total_s")
MEASURED = ("completed_per_s", "goodput_per_s", "output_tokens_per_s", *TIMES)
REFUSED = 1
"""Exit code of a run in which requests failed, or were refused: its figures count."""


def measure(name: str, given: list[str], out: Path) -> dict[str, Any] | int:
    """One run's figures, or the exit code of one that could not measure."""
    policy, _, roles = name.partition(":")
    chosen = ["--policy", policy, *(["--roles", roles] if roles else [])]
    command = [sys.executable, str(ROOT / "scripts" / "bench_serve.py"), *given, *chosen, "--out", str(out)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode not in (0, REFUSED):
        print(ran.stdout, file=sys.stderr)
        return ran.returncode
    report = json.loads((out / "bench_serve.json").read_text())
    groups = report["groups"]
    whole = groups[0] if len(groups) == 1 else next(group for group in groups if group["name"] == "all")
    return whole | {"copied": report["counters"]["blocks_copied"], "moves": report["counters"]["home_moves"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
    args, given = parser.parse_known_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.policies}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name in args.policies:
                found = measure(name, given, Path(folder))
                if isinstance(found, int):
                    return found
                runs[name].append(found)
    print(facts())
    rows = []
    for name, its in runs.items():
        row: dict[str, Any] = {"policy": name, "count": its[0]["count"], "failed": max(run["failed"] for run in its)}
        for what in MEASURED:
            values = [run[what] for run in its if run[what] is not None]
            row[what] = statistics.median(values) if values else None
        row |= {"copied": its[-1]["copied"], "moves": its[-1]["moves"]}
        row["over_first"] = row["completed_per_s"] / (rows[0]["completed_per_s"] if rows else row["completed_per_s"])
        rows.append(row)
    show(rows, " ".join(given))
    for name, its in runs.items():
        print(name, "completed/s in each round:", [round(run["completed_per_s"], 3) for run in its])
    return 0


if __name__ == "__main__":
    sys.exit(main())
