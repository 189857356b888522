"""The rotor recurrence as the literature gives it: a peer to compare with, not a solver of ours.

Reference: Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal checkpointing for
heterogeneous chains: how to train deep neural networks with limited memory", RR-9302
(hal-02352969). Stages 1..n and the loss as stage n + 1, whose sizes are 0:

    C(s,s,m) = u_f[s] + u_b[s]                                        if m >= all(s,s)
    C(s,t,m) = min of
        u_f[s] + u_b[s] + C(s+1, t, m - w_t[s])                       if m >= all(s,t)
        min over k = s+1..t of
            u_f[s..k-1] + C(k, t, m - w_a[k-1]) + C(s, k-1, m)        if m >= none(s,t)
    all(s,t)  = max(w_g[t] + w_t[s] + o_f[s],  w_g[s] + w_t[s] + o_b[s])
    none(s,t) = w_g[t] + max(w_a[s] + o_f[s],  max over j = s+1..t-1 of w_a[j-1] + w_a[j] + o_f[j])
    answer      C(1, n+1, M - w_a[0])

The conditions are the published ones: the gradient that a backward makes is not counted beside
the one that it consumes. Sizes are rounded up to slots, as published implementations do (500
slots). So a plan may need more than its budget in exact bytes, or less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
from numba import njit

from benchmarks.planner.runs import Runs
from ckptsched.base.errors import CkptschedError
from ckptsched.schedule.language import Schedule
from ckptsched.workload.chain import Chain

SLOTS = 500
MOST_BYTES = 4 * 2**30  # of the table: some 1,400 stages at 500 slots


@final
@dataclass(frozen=True)
class _Sizes:
    """Sizes in slots and seconds, by stage; the loss is the last stage."""

    forward_seconds: npt.NDArray[np.float64]
    backward_seconds: npt.NDArray[np.float64]
    state: npt.NDArray[np.int64]
    tape: npt.NDArray[np.int64]
    gradient: npt.NDArray[np.int64]
    forward_overhead: npt.NDArray[np.int64]
    backward_overhead: npt.NDArray[np.int64]


@final
class Rotor:
    """The table for one budget; it answers every smaller number of slots as well."""

    def __init__(self, chain: Chain, budget_bytes: int, slots: int = SLOTS) -> None:
        """Fill the table, in about n**3 / 6 * slots additions.

        Args:
            chain: The chain. Parameter gradients and what the caller holds, which the
                literature leaves out, are taken off the budget.
            budget_bytes: The nominal budget.
            slots: How many slots it is cut into.

        Raises:
            CkptschedError: The table would take more than `MOST_BYTES`.
        """
        n = len(chain)
        self._n = n
        fixed = chain.held_bytes + int(chain.arrays.parameter_gradient_bytes.sum())
        self.fixed_bytes = fixed
        self.unit = max(1, (budget_bytes - fixed) // slots)
        self._sizes = _round_up(chain, self.unit)
        self.top = (budget_bytes - fixed) // self.unit - int(self._sizes.state[0])
        needed = (n + 1) * (n + 2) // 2 * (max(self.top, 0) + 1) * 8
        if needed > MOST_BYTES:
            raise CkptschedError(
                f"out of reach: rotor's table for {n} stages and {self.top} slots takes "
                f"{needed / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:.1f} GB"
            )
        self._table: npt.NDArray[np.float64] = _fill(self.top, *_columns(self._sizes))

    @property
    def least(self) -> int:
        """Least slots, besides the input's, for which there is a plan; above `top` if none."""
        row = self._row(1, self._n + 1) if self.top >= 0 else np.full(1, np.inf)
        return int(np.searchsorted(-row, -np.inf, side="right"))

    def seconds(self, slots: int) -> float:
        """Seconds of the plan for a number of slots, those of the input not counted."""
        return float(self._row(1, self._n + 1)[slots])

    def nominal_bytes(self, slots: int) -> int:
        """The budget that so many slots stand for."""
        return (slots + int(self._sizes.state[0])) * self.unit + self.fixed_bytes

    def schedule(self, slots: int) -> Schedule:
        """The plan for a number of slots.

        Raises:
            CkptschedError: Nothing fits.
        """
        if not np.isfinite(self.seconds(slots)):
            raise CkptschedError(f"rotor finds nothing for {self.nominal_bytes(slots)} bytes")
        runs, n = Runs(self._n), self._n
        todo = [(1, n + 1, slots)]
        while todo:
            s, t, m = todo.pop()
            if s > t:  # the tail of a taped stage
                runs.backward(t, t)
            elif s == n + 1:
                runs.turn()
            elif s == t:
                runs.tape(s, s)
                runs.backward(s, s)
            elif (k := self._split(s, t, m)) == s:
                runs.tape(s, s)
                todo += [(s + 1, s, 0), (s + 1, t, m - int(self._sizes.tape[s]))]
            else:
                runs.forward(s, k - 1)
                todo += [(s, k - 1, m), (k, t, m - int(self._sizes.state[k - 1]))]
        return runs.schedule()

    def _row(self, s: int, t: int) -> npt.NDArray[np.float64]:
        # Rows of one s lie together, by t.
        first = (s - 1) * (self._n + 1) - (s - 1) * (s - 2) // 2
        row: npt.NDArray[np.float64] = self._table[first + t - s]
        return row

    def _split(self, s: int, t: int, m: int) -> int:
        """The first split of least seconds; s itself stands for a tape."""
        z = self._sizes
        best, found = np.inf, s
        tape = int(z.tape[s])
        run = int(z.gradient[t] + z.forward_overhead[s])
        back = int(z.gradient[s] + z.backward_overhead[s])
        if m >= tape + max(run, back):
            best = z.forward_seconds[s] + z.backward_seconds[s] + self._row(s + 1, t)[m - tape]
        if m >= _none(s, t, z.state, z.gradient, z.forward_overhead):
            sweep = 0.0
            for k in range(s + 1, t + 1):
                sweep += z.forward_seconds[k - 1]
                rest = m - int(z.state[k - 1])
                if rest >= 0:
                    seconds = sweep + self._row(k, t)[rest] + self._row(s, k - 1)[m]
                    if seconds < best:
                        best, found = seconds, k
        return found


def _round_up(chain: Chain, unit: int) -> _Sizes:
    c = chain.arrays

    def slots(values: npt.NDArray[np.int64], last: int = 0) -> npt.NDArray[np.int64]:
        return -(-np.append(values, last) // unit)

    return _Sizes(
        forward_seconds=np.append(c.forward_seconds, chain.loss_seconds),
        backward_seconds=np.append(c.backward_seconds, 0.0),
        state=slots(c.state_bytes),
        tape=slots(c.tape_bytes),
        gradient=slots(c.gradient_bytes),
        forward_overhead=slots(c.forward_overhead_bytes, chain.loss_overhead_bytes),
        backward_overhead=slots(c.backward_overhead_bytes),
    )


def _columns(z: _Sizes) -> tuple[Any, ...]:
    return (
        z.forward_seconds,
        z.backward_seconds,
        z.state,
        z.tape,
        z.gradient,
        z.forward_overhead,
        z.backward_overhead,
    )


@njit(cache=True)
def _none(s, t, state, gradient, overhead):  # type: ignore[no-untyped-def]
    """none(s,t) in slots."""
    most = state[s] + overhead[s]
    for j in range(s + 1, t):
        most = max(most, state[j - 1] + state[j] + overhead[j])
    return gradient[t] + most


@njit(cache=True)
def _fill(top, u_f, u_b, w_a, w_t, w_g, o_f, o_b):  # type: ignore[no-untyped-def]
    """C(s,t,m) for all segments and slots; rows by s, then t, shape (segments, top + 1)."""
    last = len(u_f) - 1  # the loss
    table = np.full((last * (last + 1) // 2, max(top, -1) + 1), np.inf)
    first = np.zeros(last + 2, dtype=np.int64)  # table[first[s] + t] is the row of (s, t)
    for s in range(1, last + 1):
        first[s] = (s - 1) * last - (s - 1) * (s - 2) // 2 - s
    for d in range(last):
        for s in range(1, last - d + 1):
            t = s + d
            row = table[first[s] + t]
            need = w_t[s] + max(w_g[t] + o_f[s], w_g[s] + o_b[s])
            run = u_f[s] + u_b[s]
            if d == 0:
                row[need:] = run
                continue
            rest = table[first[s + 1] + t]
            for m in range(need, top + 1):
                row[m] = run + rest[m - w_t[s]]
            need = _none(s, t, w_a, w_g, o_f)
            sweep = 0.0
            for k in range(s + 1, t + 1):
                sweep += u_f[k - 1]
                upper, lower = table[first[k] + t], table[first[s] + k - 1]
                size = w_a[k - 1]
                for m in range(max(need, size), top + 1):
                    seconds = sweep + upper[m - size] + lower[m]
                    if seconds < row[m]:
                        row[m] = seconds
    return table
