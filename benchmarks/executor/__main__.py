"""Does a planned step ever take longer than another method's in the memory of that method?

From the root of the repository:

    python -m benchmarks.executor --document                    # everything: about 15 minutes
    python -m benchmarks.executor --networks transformer        # one network
    python -m benchmarks.executor --quick --no-compiled         # small networks: a minute
    python -m benchmarks.executor --show A.json B.json --document   # of runs one network each

Peers: plain autograd; torch.utils.checkpoint per block, per step, in segments and recursively;
ANODE; torch.compile's `activation_memory_budget` (`benchmarks.executor.peers`). The measured peak
of each is the budget of a plan of ours, and both are timed in turn, on one thread. Steps are
forward, loss and backward; seconds are the least of all turns. Each network has a process of its
own. Prints tables and which goals are met; writes `results/executor-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgets import machine
from benchmarks.document import Goal, Section, to_markdown
from benchmarks.executor.networks import NETWORKS
from benchmarks.executor.rows import Options, Report, measure
from benchmarks.executor.tables import goals, grid, notes

RESULTS = Path(__file__).resolve().parents[1] / "results"
_VERDICTS = {True: "**met**", False: "**not met**", None: "not run"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the networks named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.executor",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, help="turns of each method; 2 where quick, else 5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small networks, no fused kernels")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--inductor",
        nargs="*",
        default=["transformer", "resnet50"],
        help="networks that inductor compiles, which takes minutes each",
    )
    parser.add_argument(
        "--document", action="store_true", help="also write docs/measured/executor.md"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--show", type=Path, nargs="+", help="read these files, measure nothing")
    args = parser.parse_args(argv)
    data = read(args.show) if args.show else take(args)
    reports = [Report.from_json(x) for x in data["networks"]]
    verdicts = goals(reports)
    if args.show:
        show(reports)
    print("\nGoals", *verdicts, sep="\n")
    path = args.out or RESULTS / f"executor-{data['about']['date']}.json"
    path.parent.mkdir(exist_ok=True)
    data["goals"] = [asdict(x) for x in verdicts]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.name}")
    if args.document:
        Section("benchmarks.executor").write(text(data, reports, verdicts))


def take(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print each network as it is done."""
    torch.set_num_threads(1)
    about = machine(args.device) | {"cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    reports = []
    for report in run(args):
        reports.append(report.to_json())
        show([report])
    about["load_at_end"] = os.getloadavg()[0]
    return {"about": about, "quick": args.quick, "networks": reports}


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """Earlier runs as one: of a network that several have, the last."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    networks = {x["network"]: x for found in runs for x in found["networks"]}
    ordered = [networks[name] for name in NETWORKS if name in networks]
    about = runs[-1]["about"] | {"load_at_start": runs[0]["about"]["load_at_start"]}
    return {"about": about, "quick": any(x["quick"] for x in runs), "networks": ordered}


def show(reports: Sequence[Report]) -> None:
    """Tables for a terminal."""
    for report in reports:
        print(f"\n{report.network}\n{grid(report)}", *notes(report), sep="\n", flush=True)


def run(args: argparse.Namespace) -> Iterator[Report]:
    """Each network in a process of its own, as what ran before would show in its times."""
    spawned = multiprocessing.get_context("spawn")
    for name in args.networks:
        options = Options(
            device=args.device,
            rounds=args.rounds or (2 if args.quick else 5),
            quick=args.quick,
            compiled=not args.no_compiled,
            inductor=not args.quick and name in args.inductor,
        )
        with ProcessPoolExecutor(max_workers=1, mp_context=spawned) as pool:
            yield pool.submit(measure, name, options).result()


def text(data: dict[str, Any], reports: Sequence[Report], verdicts: Sequence[Goal]) -> str:
    """The section of `docs/measured/executor.md`."""
    about = data["about"]
    parts = [
        f"{about['date']}, {about['cores']} cores ({about['device']}), one thread, Python "
        f"{about['python']}, torch {about['torch']}; load {about['load_at_start']:.1f} when it "
        f"began, {about['load_at_end']:.1f} when it ended.",
        *(["A quick run: small networks, few turns."] if data["quick"] else []),
    ]
    for report in reports:
        parts += [to_markdown(grid(report)), "\n".join(f"- {x}" for x in notes(report))]
    parts += [
        "## Goals of the execution",
        "\n".join(f"- {_VERDICTS[x.met]} {x.what}: {x.shown_by}" for x in verdicts),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
