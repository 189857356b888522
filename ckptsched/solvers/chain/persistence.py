"""When the best memory-persistent schedule is the best of all pinned schedules."""

from __future__ import annotations

import itertools

from ...workload.chain import Chain

ALL_PINNED = "all pinned schedules"


def persistent_is_optimal(chain: Chain) -> bool:
    """Whether a theorem says that no pinned schedule beats the best memory-persistent one.

    True where states never grow along the chain, from state 1 to state n - 1, and the gradients
    that are there before Backward(i), those of later stages' parameters included, take no more
    than any of the states 1..i (docs/concepts/theory.md, theorem 1; both conditions are needed),
    and no tape of a stage is made in fewer seconds or bytes than its state. Nothing is said of
    chains with a ledger, as the theorem is one of the planning model.

    Args:
        chain: Any chain.

    Returns:
        False where the theorem does not apply; the persistent optimum may be the optimum even so.
    """
    if chain.has_ledger or not _runs_are_fastest(chain):
        return False
    if len(chain) == 1:  # nothing but whether its state is kept through the loss
        return True
    states = [stage.state_bytes for stage in chain.stages]
    if any(after > before for before, after in itertools.pairwise(states[:-1])):
        return False
    later = 0  # bytes of the parameter gradients of the stages after i
    for i in range(len(chain), 0, -1):
        least = min(states[max(0, i - 2) : i])  # of states 1..i: but for the last they never grow
        if chain.stages[i - 1].gradient_bytes + later > least:
            return False
        later += chain.stages[i - 1].parameter_gradient_bytes
    return True


def _runs_are_fastest(chain: Chain) -> bool:
    """Whether a run without tape takes no more seconds and bytes than one with any tape."""
    return all(
        stage.forward_seconds <= tape.forward_seconds
        and stage.state_bytes + stage.forward_overhead_bytes
        <= tape.tape_bytes + tape.forward_overhead_bytes
        for stage in chain.stages
        for tape in stage.tapes
    )
