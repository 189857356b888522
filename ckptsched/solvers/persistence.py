"""When the best memory-persistent schedule is the best of all pinned schedules."""

from __future__ import annotations

import numpy as np

from ..workload import Chain
from .pinned_sizes import are_runs_fastest, pinned_sizes


def persistent_is_optimal(chain: Chain) -> bool:
    """Whether a theorem says that no pinned schedule beats the best memory-persistent one.

    True where states never grow along the chain, from state 1 to state n - 1, and the gradients
    that are there before Backward(i), those of later stages' parameters included, take no more
    than any of the states 1..i (docs/theory.md, theorem 1; both conditions are needed), and a
    stage that offers several tapes makes none of them in less than its state. Nothing is said of
    chains with a ledger, as the theorem is one of the planning model.

    Args:
        chain: Any chain.

    Returns:
        False where the theorem does not apply: the persistent optimum may be the optimum even
        so, and `pinned_lower_bounds` often shows it.
    """
    if chain.has_ledger:
        return False
    n, sizes = len(chain), pinned_sizes(chain)
    if n == 1:  # nothing but whether its state is kept through the loss
        return are_runs_fastest(sizes)
    states = sizes.state[1:]
    never_grow = bool((states[1:-1] <= states[:-2]).all())
    least_so_far = np.minimum.accumulate(states)
    small_gradients = bool((sizes.level[1 : n + 1] <= least_so_far).all())
    return never_grow and small_gradients and are_runs_fastest(sizes)
