"""What the rows of the planner's benchmark say about its goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.document import Goal
from benchmarks.planner.parts import (
    AUTO,
    FRONTIER,
    LENGTHS,
    LONG_INSTANCE,
    LONG_UNIT,
    OPERATIONS,
    TABLE,
)
from benchmarks.planner.peers import PEERS
from benchmarks.planner.rows import Findings, Row

_FRONTIER_LIMITS = {"random_n100_s0": 0.03, "random_n200_s0": 0.3, "random_n500_s0": 4.0}
_LONG_LIMITS = {AUTO: 5.0, FRONTIER: 20.0}
_GAPS = {LONG_INSTANCE: 0.03}
_GAP = 0.01
_MEMORY = 2 * 10**9


def goals(found: Findings) -> list[Goal]:
    """Every goal of the planner."""
    return [
        _never_costlier(found),
        *(_gap(name, found) for name in _instances(found)),
        *_operations(found),
        *_frontiers(found),
        *(_long(method, limit, found) for method, limit in _LONG_LIMITS.items()),
        _memory(found),
    ]


def _never_costlier(found: Findings) -> Goal:
    what = "never a costlier plan than any peer at the same exact peak"
    worse = [x for x in found.comparisons if x.is_worse]
    if not found.comparisons:
        return Goal(what, None, "no comparison")
    cheaper = [x for x in found.comparisons if x.excess < -1e-9]
    over = sum(not x.within_nominal for x in found.comparisons)
    text = f"{len(found.comparisons)} comparisons, {len(worse)} worse"
    if worse:
        most = max(worse, key=lambda x: x.excess)
        text += f" (at most by {most.excess:.4%}, {most.chain} at {most.peak_bytes} bytes)"
    mean = sum(x.excess for x in cheaper) / max(len(cheaper), 1)
    text += f", {len(cheaper)} cheaper (by {-mean:.2%} on average)"
    return Goal(what, not worse, f"{text}; the peer was over its own budget in {over}")


def _instances(found: Findings) -> list[str]:
    return list(dict.fromkeys(x.chain for x in _ours(found, "instances")))


def _ours(found: Findings, part: str) -> list[Row]:
    return [x for x in found.rows if x.part == part and x.method == AUTO]


def _gap(name: str, found: Findings) -> Goal:
    limit = _GAPS.get(name, _GAP)
    what = f"gap of auto to the lower bound at most {limit:.0%} on {name}"
    rows = [x for x in _ours(found, "instances") if x.chain == name]
    gaps = [row_gap(x) for x in rows]
    known = [x for x in gaps if x is not None]
    if len(known) < len(rows):
        return Goal(what, False, f"{len(rows) - len(known)} of {len(rows)} budgets have no plan")
    losses = [x.loss for x in rows if x.loss is not None]
    text = f"{len(known)} budgets, at most {max(known):.3%}"
    if losses:
        text += f"; over the best schedule known {max(losses):+.3%} at most"
    return Goal(what, max(known) <= limit, text)


def row_gap(row: Row) -> float | None:
    """Seconds over the better of the certificate's bound and the reference's, less 1.

    Both hold for persistent schedules: a plan that is none may go below, which is no gap.
    """
    if row.quality is None or row.quality.gap is None:
        return None
    own = row.quality.relative / (1 + row.quality.gap)
    return max(row.quality.relative / max(own, row.known_bound or 0.0) - 1, 0.0)


def _operations(found: Findings) -> list[Goal]:
    longest = LENGTHS[-1]
    rows = [x for x in found.rows if x.part == "uniform" and x.stages == longest]
    goals = []
    for s in sorted({x.slots for x in rows if x.slots}):
        of_s = [x for x in rows if x.slots == s]
        ours = _least(x for x in of_s if x.method == OPERATIONS)
        theirs = _least(x for x in of_s if x.method in PEERS)
        what = f"uniform n = {longest}, s = {s}: operations in hand faster than every peer"
        goals.append(Goal(what, ours < theirs, f"{ours:.3f} s; the fastest peer {theirs:.3f} s"))
    plans = _ours(Findings([x for x in rows if x.method == AUTO]), "uniform")
    if plans:
        slowest = max(x.timing.median for x in plans)
        what = f"uniform n = {longest}: planned, lowered and simulated within two seconds"
        goals.append(Goal(what, slowest <= 2.0, f"at most {slowest:.2f} s"))
    return goals


def _least(rows: Iterable[Row]) -> float:
    return min((x.timing.median for x in rows), default=float("inf"))


def _frontiers(found: Findings) -> list[Goal]:
    goals = []
    for row in found.rows:
        limit = _FRONTIER_LIMITS.get(row.chain)
        if row.part == "frontier" and row.method == TABLE and limit is not None:
            what = f"whole frontier at 500 units, n = {row.stages}, in under {limit:g} s"
            taken = row.timing.median
            goals.append(Goal(what, taken < limit, f"{taken:.3f} s"))
    return goals


def _long(method: str, limit: float, found: Findings) -> Goal:
    what = f"{LONG_INSTANCE}, {method}, in under {limit:g} s"
    most = 1_000 * LONG_UNIT  # of a single budget; the frontier has its own
    rows = [x for x in _long_rows(found) if x.method == method]
    taken = [x.timing.median for x in rows if (x.budget_bytes or 0) <= most]
    if not taken:
        return Goal(what, None, "not run")
    text = f"at most {max(taken):.2f} s" if max(taken) < float("inf") else "a run did not end"
    return Goal(what, max(taken) < limit, text)


def _memory(found: Findings) -> Goal:
    what = f"{LONG_INSTANCE} in less than {_MEMORY / 1e9:g} GB"
    rows = [x for x in _long_rows(found) if x.method in _LONG_LIMITS and x.timing.seconds]
    if not rows:
        return Goal(what, None, "no run ended")
    peak = max(x.timing.peak_bytes for x in rows)
    base = min(x.timing.base_bytes for x in rows)
    text = f"{peak / 1e9:.2f} GB at most, of which {base / 1e9:.2f} were there before"
    return Goal(what, peak < _MEMORY, text)


def _long_rows(found: Findings) -> Sequence[Row]:
    return [x for x in found.rows if x.chain == LONG_INSTANCE]
