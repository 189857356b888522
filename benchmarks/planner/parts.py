"""The parts of the planner's benchmark: what is run, on which chains, beside which peers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from benchmarks.planner import chains
from benchmarks.planner.peers import PEERS, Peer
from benchmarks.planner.rotor import SLOTS, Rotor
from benchmarks.planner.rows import Comparison, Findings, Quality, Row, judge, judge_plan
from benchmarks.timing import Timing, measure
from ckptsched.base import jit
from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.fitting.planning import plan
from ckptsched.planner.plan import Plan
from ckptsched.planner.tradeoff import Tradeoff, tradeoff
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers import get_solver
from ckptsched.solvers.binomial.revolve import revolve_schedule
from ckptsched.solvers.chain.sizes import chain_sizes
from ckptsched.solvers.chain.tables import Table
from ckptsched.workload.chain import Chain

INSTANCES = Path(__file__).resolve().parents[1] / "instances"
LONG_INSTANCE = "ode_L8_Nt1000"
AUTO = 'plan(solver="auto")'
OPERATIONS = "revolve, operations only"
ROTOR = "rotor, 500 slots"
TABLE = "chain_dp, table of 500 units"
FRONTIER = "tradeoff, 10 budgets"

LENGTHS = (100, 1_000, 10_000, 100_000)
SLOTS_OF_UNIFORM = (3, 10, 30, 100)
# Units of a tape: as large as a state, as tape-as-checkpoint schedules assume, and as usual.
TAPES = (1, 4)
LONG_UNIT = 4 * 2**20  # of the long instance: all its sizes are multiples
LONG_UNITS = (400, 600, 1_000, 2_000)  # its budgets; storing everything takes 700,000
SHARES = (1.0, 0.6, 0.35, 0.2)  # of store-all, for chains without reference budgets
# Rotor's table answers smaller numbers of slots as well: so many plans of each are compared.
_PLANS_OF_A_TABLE = 5
_LONG = 300  # stages from which fewer are compared, as each takes seconds
_FRONTIER_CHAINS = ("random_n100_s0", "random_n200_s0", "random_n500_s0")


@final
@dataclass(frozen=True)
class Options:
    """How much is run."""

    repetitions: int = 3
    limit_seconds: float = 60.0
    quick: bool = False
    say: Callable[[str], None] = print


def our_plan(chain: Chain, budget: int) -> Plan:
    """What a user gets, without the cache of plans: it would show reading a file."""
    return plan(chain, budget=budget, cache=False, progress=False)


def load(name: str) -> Chain:
    """An instance by name; the long one is made, as its file would be large."""
    if name == LONG_INSTANCE:
        return chains.ode_network(8, 1000)
    return Chain.load(INSTANCES / f"{name}.json")


def references() -> dict[str, list[dict[str, Any]]]:
    """Budgets of the instances, with bounds and the best schedules known."""
    data = json.loads((INSTANCES / "reference.json").read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = data["instances"]
    return found


# ---- Uniform chains


def uniform_part(options: Options) -> Iterator[Findings]:
    """Peers and ours on uniform chains, where the peers' plans need the same bytes."""
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    given_up: dict[str, list[tuple[int, int]]] = {}
    for n, s in itertools.product(lengths, SLOTS_OF_UNIFORM):
        if s < n:
            yield _uniform_case(n, s, given_up, options)


def _uniform_case(
    n: int, s: int, given_up: dict[str, list[tuple[int, int]]], options: Options
) -> Findings:
    """All peers for n steps and s slots, then ours at the peaks of their plans."""
    made = [chains.uniform(n, tape) for tape in TAPES]
    rows: list[Row] = []
    for peer in PEERS.values():
        rows += _peer_rows(peer, made, s, given_up.setdefault(peer.name, []), options)
    timing = measure(
        lambda: revolve_schedule(n, s),
        read=lambda schedule: [judge(chain, schedule) for chain in made],
        warm_up=lambda: revolve_schedule(9, 3),
        repetitions=options.repetitions,
        limit_seconds=options.limit_seconds,
    )
    rows += _rows_of("uniform", made, OPERATIONS, timing, slots=s)
    found = Findings(rows)
    for chain in made:
        theirs = [row for row in rows if row.chain == chain.name and row.quality is not None]
        for peak in sorted({row.quality.peak_bytes for row in theirs if row.quality}):
            found += _ours_at(chain, peak, theirs, options)
    return found


def _peer_rows(
    peer: Peer, made: Sequence[Chain], s: int, given_up: list[tuple[int, int]], options: Options
) -> list[Row]:
    n = len(made[0])
    if peer.missing:
        options.say(f"skipped: {peer.name}: {peer.missing}")
        return []
    smaller = next(((a, b) for a, b in given_up if a <= n and b <= s), None)
    if smaller is not None:
        note = f"> {options.limit_seconds:g} s, as n = {smaller[0]}, s = {smaller[1]} took longer"
        return _rows_of("uniform", made, peer.name, Timing((), 0, 0, None, note), slots=s)
    timing = measure(
        lambda: peer.actions(n, s),
        read=lambda actions: [judge(chain, peer.schedule(n, actions)) for chain in made],
        warm_up=lambda: peer.actions(9, 3),
        repetitions=options.repetitions,
        limit_seconds=options.limit_seconds,
    )
    if not timing.seconds:
        given_up.append((n, s))
    return _rows_of("uniform", made, peer.name, timing, slots=s)


def _rows_of(
    part: str, made: Sequence[Chain], method: str, timing: Timing, slots: int | None = None
) -> list[Row]:
    found: Sequence[Quality | None] = timing.found or [None] * len(made)
    return [
        Row(
            part=part,
            chain=chain.name,
            stages=len(chain),
            method=method,
            timing=timing,
            slots=slots,
            quality=quality,
        )
        for chain, quality in zip(made, found, strict=True)
    ]


def _ours_at(chain: Chain, peak: int, theirs: Iterable[Row], options: Options) -> Findings:
    """Our plan at a peak, timed, beside every peer's plan of that peak."""
    row = our_row("uniform", chain, peak, options)
    ours = row.quality.seconds if row.quality else float("inf")
    found = [
        Comparison(
            chain=chain.name,
            peer=f"{other.method}, s = {other.slots}",
            peak_bytes=peak,
            peer_seconds=other.quality.seconds,
            our_seconds=ours,
        )
        for other in theirs
        if other.quality and other.quality.peak_bytes == peak and other.method in PEERS
    ]
    return Findings([row], found)


def our_row(
    part: str, chain: Chain, budget: int, options: Options, reference: dict[str, Any] | None = None
) -> Row:
    """Our plan for one budget, timed."""
    timing = measure(
        lambda: our_plan(chain, budget),
        read=judge_plan,
        warm_up=warm_up,
        repetitions=options.repetitions,
        limit_seconds=5 * options.limit_seconds,
    )
    return Row(
        part=part,
        chain=chain.name,
        stages=len(chain),
        method=AUTO,
        timing=timing,
        budget_bytes=budget,
        quality=timing.found,
        known_best=(reference or {}).get("best_known"),
        known_bound=(reference or {}).get("lower_bound"),
    )


def warm_up() -> None:
    """Load every compiled kernel, by planning small chains of each kind, compiled all the same."""
    jit.INTERPRETED_STEPS = 0
    for chain in (chains.uniform(12, 2), chains.unet(9, 1), chains.ode_network(2, 12)):
        peak = simulate(chain, get_solver("store_all").solve(chain, 2**62).schedule).peak_bytes
        our_plan(chain, peak // 2)


def warm_up_rotor() -> None:
    """Load rotor's kernels."""
    rotor = Rotor(chains.unet(5, 1), 2**40, 20)
    rotor.schedule(rotor.top)


# ---- Heterogeneous chains


def instances_part(names: Sequence[str], options: Options) -> Iterator[Findings]:
    """Instances with their reference budgets: ours and rotor, timed and compared."""
    known = references()
    for name in names:
        chain = load(name)
        rows = known.get(name) or [{"budget_bytes": m * LONG_UNIT} for m in LONG_UNITS]
        if options.quick:
            rows = rows[:: max(len(rows) // 2, 1)]
        for reference in rows:
            budget = reference["budget_bytes"]
            yield Findings([our_row("instances", chain, budget, options, reference)])
            yield _beside_rotor(chain, budget, options, timed=True)


def seeded_part(options: Options) -> Iterator[Findings]:
    """Seeded chains of many shapes: only quality, at the exact peaks of rotor's plans."""
    lengths = (5, 14, 40) if options.quick else chains.LENGTHS
    for seed in (1,) if options.quick else (1, 2, 3):
        for chain in chains.seeded(lengths, seed):
            for share in SHARES:
                yield _beside_rotor(chain, int(share * _store_all_peak(chain)), options)


def _store_all_peak(chain: Chain) -> int:
    return get_solver("store_all").solve(chain, 2**62).trace.peak_bytes


@final
@dataclass(frozen=True)
class _Theirs:
    """Rotor's plan for one number of slots."""

    quality: Quality
    nominal_bytes: int


def _beside_rotor(chain: Chain, budget: int, options: Options, timed: bool = False) -> Findings:
    """Rotor's plans for a budget and for fewer slots of its table, and ours at their peaks."""

    def solve() -> tuple[Rotor, Schedule | None]:
        rotor = Rotor(chain, budget)
        return rotor, rotor.schedule(rotor.top) if rotor.least <= rotor.top else None

    def read(result: tuple[Rotor, Schedule | None]) -> list[_Theirs]:
        rotor = result[0]
        count = _PLANS_OF_A_TABLE if len(chain) < _LONG else 2
        slots = np.unique(np.linspace(rotor.top, rotor.least, count).astype(int))[::-1]
        return [
            _Theirs(judge(chain, rotor.schedule(int(m))), rotor.nominal_bytes(int(m)))
            for m in slots
            if rotor.least <= m
        ]

    timing = measure(
        solve,
        read=read,
        warm_up=warm_up_rotor,
        repetitions=options.repetitions if timed else 1,
        limit_seconds=options.limit_seconds,
    )
    theirs: list[_Theirs] = timing.found or []
    row = Row(
        part="instances" if timed else "seeded",
        chain=chain.name,
        stages=len(chain),
        method=ROTOR,
        timing=timing,
        slots=SLOTS,
        budget_bytes=budget,
        quality=theirs[0].quality if theirs else None,
    )
    ours = measure(
        lambda: [_our_seconds(chain, other.quality.peak_bytes) for other in theirs],
        read=lambda seconds: seconds,
        warm_up=warm_up,
        repetitions=1,
        limit_seconds=20 * options.limit_seconds,
    )
    found = [
        Comparison(
            chain=chain.name,
            peer=ROTOR,
            peak_bytes=other.quality.peak_bytes,
            peer_seconds=other.quality.seconds,
            our_seconds=seconds,
            within_nominal=other.quality.peak_bytes <= other.nominal_bytes,
        )
        for other, seconds in zip(theirs, ours.found or [float("inf")] * len(theirs), strict=True)
    ]
    return Findings([row], found)


def _our_seconds(chain: Chain, budget: int) -> float:
    try:
        return our_plan(chain, budget).seconds
    except InfeasibleBudgetError:
        return float("inf")


# ---- Whole frontiers


def frontier_part(options: Options) -> Iterator[Findings]:
    """The whole frontier at 500 units, ours and rotor's table; the long instance's."""
    names = _FRONTIER_CHAINS[:1] if options.quick else _FRONTIER_CHAINS
    for name in names:
        chain = load(name)
        yield Findings([_our_table(chain, options), _rotor_table(chain, options)])
    if not options.quick:
        chain = load(LONG_INSTANCE)
        yield Findings([_our_frontier(chain, options)])


def _our_table(chain: Chain, options: Options) -> Row:
    """The table that holds every budget up to storing everything, in 500 units."""
    sizes = chain_sizes(chain)
    unit = -(-_store_all_peak(chain) // SLOTS)
    timing = measure(
        lambda: Table(sizes, unit, SLOTS * unit),
        warm_up=warm_up,
        repetitions=options.repetitions,
        limit_seconds=options.limit_seconds,
    )
    return _frontier_row(chain, TABLE, timing)


def _our_frontier(chain: Chain, options: Options) -> Row:
    """Ten budgets of the long instance, up to 2,000 units, from one solve."""
    low, high = LONG_UNITS[0], LONG_UNITS[-1]
    budgets = [LONG_UNIT * int(m) for m in np.geomspace(low, high, 10).round()]

    def read(found: Tradeoff) -> Quality:
        worst = max(found.rows, key=lambda row: row.plan.gap)
        return judge_plan(worst.plan)

    timing = measure(
        lambda: tradeoff(chain, budgets, cache=False),
        read=read,
        warm_up=warm_up,
        repetitions=options.repetitions,
        limit_seconds=5 * options.limit_seconds,
    )
    return _frontier_row(chain, FRONTIER, timing)


def _rotor_table(chain: Chain, options: Options) -> Row:
    budget = _store_all_peak(chain)
    timing = measure(
        lambda: Rotor(chain, budget),
        warm_up=warm_up_rotor,
        repetitions=options.repetitions,
        limit_seconds=options.limit_seconds,
    )
    return _frontier_row(chain, ROTOR, timing)


def _frontier_row(chain: Chain, method: str, timing: Timing) -> Row:
    return Row(
        part="frontier",
        chain=chain.name,
        stages=len(chain),
        method=method,
        timing=timing,
        quality=timing.found,
    )


# ---- Compilation


_COMPILE = """
import time
from benchmarks.planner.parts import warm_up
start = time.perf_counter()
warm_up()
first = time.perf_counter() - start
start = time.perf_counter()
warm_up()
print(first, time.perf_counter() - start)
"""


def compile_seconds() -> dict[str, float]:
    """Seconds that the first plans take in a fresh cache of kernels, and in a process after it."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for when in ("first", "cached"):
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE],
                env=os.environ | {"NUMBA_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            cold, warm = map(float, done.stdout.split()[-2:])
            found[f"{when}_process_seconds"] = round(cold, 3)
            found["warm_seconds"] = round(warm, 3)
    return found
