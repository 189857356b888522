"""How long does planning take, and how good are the plans, beside peers in the same run?

From the root of the repository:

    python -m benchmarks.planner --document            # everything: about an hour
    python -m benchmarks.planner --instances gpt96     # ours and rotor on one instance
    python -m benchmarks.planner --uniform --quick     # short uniform chains only

Peers are checkpoint-schedules, pyrevolve (`planner.peers`) and the published rotor recurrence
(`planner.rotor`). Every plan, whoever made it, is judged by the one simulator in exact bytes.
A peer's exact peak is the budget of ours beside it. Seconds are medians of three runs, of a single
one where it takes more than a minute; each measurement runs in a process of its own, with kernels
compiled before. Prints tables and which goals are met; writes `results/planner-<date>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.document import Goal, Section, to_markdown
from benchmarks.planner.goals import goals
from benchmarks.planner.parts import (
    LONG_INSTANCE,
    Options,
    compile_seconds,
    frontier_part,
    instances_part,
    references,
    seeded_part,
    uniform_part,
)
from benchmarks.planner.rows import Findings
from benchmarks.planner.tables import comparisons_to_json, grids, line

RESULTS = Path(__file__).resolve().parents[1] / "results"
_PACKAGES = ("numpy", "numba", "checkpoint-schedules", "pyrevolve")


def about() -> dict[str, Any]:
    """What figures depend on, without naming a machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def run(names: Sequence[str], args: argparse.Namespace, options: Options) -> Iterator[Findings]:
    """The parts that were asked for."""
    if args.uniform:
        yield from uniform_part(options)
    yield from instances_part(names, options)
    if args.seeded:
        yield from seeded_part(options)
    if args.frontier:
        yield from frontier_part(options)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts named, or all."""
    known = [*references(), LONG_INSTANCE]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--uniform", action="store_true", help="uniform chains, all peers")
    parser.add_argument("--instances", nargs="*", choices=known, help="all if none is named")
    parser.add_argument("--seeded", action="store_true", help="seeded chains, quality only")
    parser.add_argument("--frontier", action="store_true", help="whole frontiers")
    parser.add_argument("--quick", action="store_true", help="short chains, few budgets, one run")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a peer's run may take")
    parser.add_argument(
        "--document", action="store_true", help="also write docs/measured/planner.md"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    if not (args.uniform or args.seeded or args.frontier or args.instances is not None):
        args.uniform = args.seeded = args.frontier = True
        args.instances = []
    names: list[str] = [] if args.instances is None else (args.instances or known)
    if args.quick and not args.instances:
        names = names[:2]
    options = Options(1 if args.quick else 3, args.limit, args.quick)
    report: dict[str, Any] = {"about": about(), "quick": args.quick}
    report["compile"] = compile_seconds()
    print(f"compilation: {report['compile']}", flush=True)
    found = Findings()
    for some in run(names, args, options):
        found += some
        for row in some.rows:
            print(line(row), flush=True)
        for defeat in filter(lambda x: x.is_worse, some.comparisons):
            print(f"WORSE by {defeat.excess:.4%}: {defeat}", flush=True)
    verdicts = goals(found)
    for grid in grids(found):
        print(f"\n{grid.title}\n{grid}")
    print("\nGoals", *verdicts, sep="\n")
    report |= {
        "goals": [asdict(x) for x in verdicts],
        "comparisons": comparisons_to_json(found.comparisons),
        "rows": [x.to_json() for x in found.rows],
    }
    path = args.out or RESULTS / f"planner-{report['about']['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.name}")
    if args.document:
        document(report, found, verdicts)


def document(report: dict[str, Any], found: Findings, verdicts: Sequence[Goal]) -> None:
    """Put the figures between the marks in `docs/measured/planner.md`."""
    facts, compiled = report["about"], report["compile"]
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    parts = [
        f"{facts['date']}, {facts['cores']} cores ({facts['architecture']}), Python "
        f"{facts['python']}, {packages}; load when it began {facts['load_at_start']:.1f}.",
        f"Kernels, compiled and used for the first time: {compiled['first_process_seconds']:.1f} "
        f"s; from the cache, in a new process: {compiled['cached_process_seconds']:.1f} s; from "
        f"then on: {compiled['warm_seconds']:.2f} s.",
        *(["A quick run: short chains, few budgets, one run each."] if report["quick"] else []),
        *(to_markdown(grid) for grid in grids(found)),
        "## Goals",
        "\n".join(f"- {_VERDICTS[x.met]} {x.what}: {x.shown_by}" for x in verdicts),
    ]
    Section("benchmarks.planner").write("\n\n".join(parts))


_VERDICTS = {True: "**met**", False: "**not met**", None: "not run"}


if __name__ == "__main__":
    main()
