"""Peers that plan uniform chains, and their plans as schedules of our language.

Each takes n equal steps and s slots of memory, the input counted among them. A plan's actions are
one thing (that is what is timed), the schedule that they stand for another: `schedule` reads them
in the way that needs least memory (`planner.runs`), so that peak and seconds come from the one
simulator that judges ours. Packages are imported when a peer is asked, and may be missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

from benchmarks.planner.runs import Runs
from ckptsched.schedule.language import Schedule


@final
@dataclass(frozen=True)
class Peer:
    """One method of one package."""

    name: str
    """Name in tables."""
    package: str
    """Distribution that has it, as pip knows it."""
    actions: Callable[[int, int], Sequence[Any]]
    """All actions for n steps and s slots, as the package gives them: what is timed."""
    schedule: Callable[[int, Sequence[Any]], Schedule]
    """The same as a schedule of our language."""

    @property
    def missing(self) -> str:
        """Why the peer cannot be asked; empty where it can."""
        if importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed: pip install 'ckptsched[bench]'"
        return ""

    @property
    def version(self) -> str:
        """Version of the package."""
        return version(self.package)


def _checkpoint_schedules(
    make: Callable[[Any, int, int], Any],
) -> Callable[[int, int], Sequence[Any]]:
    def actions(n: int, s: int) -> Sequence[Any]:
        package = importlib.import_module("checkpoint_schedules")
        found = []
        for action in make(package, n, s):
            found.append(action)
            if isinstance(action, package.EndReverse):
                return found
        raise AssertionError("the actions end without EndReverse")

    return actions


def _schedule_of_actions(n: int, actions: Sequence[Any]) -> Schedule:
    """Read checkpoint-schedules' actions, whose steps count from 0.

    A Forward starts where the Copy or Move before it said, or where the last one ended: either
    way its own n0 says so, and what must be stored for that follows. Move, Copy and the storage
    of a Forward therefore add nothing.
    """
    package = importlib.import_module("checkpoint_schedules")
    runs = Runs(n)
    for action in actions:
        if isinstance(action, package.Forward):
            run = runs.tape if action.write_adj_deps else runs.forward
            run(int(action.n0) + 1, int(action.n1))
        elif isinstance(action, package.Reverse):
            runs.backward(int(action.n1), int(action.n0) + 1)
        elif isinstance(action, package.EndForward):
            runs.turn()
    return runs.schedule()


def _pyrevolve_actions(n: int, s: int) -> Sequence[Any]:
    schedulers = importlib.import_module("pyrevolve.schedulers")
    actions: Sequence[Any] = schedulers.CRevolve(s, n).oplist  # made by the constructor
    return actions


def _schedule_of_pyrevolve(n: int, actions: Sequence[Any]) -> Schedule:
    """Read pyrevolve's actions: ADVANCE runs, LASTFW and REVERSE run one step with its tape."""
    action_types = importlib.import_module("pyrevolve.schedulers").Action
    runs = Runs(n)
    for action in actions:
        if action.type == action_types.ADVANCE:
            runs.forward(action.old_capo + 1, action.capo)
        elif action.type in (action_types.LASTFW, action_types.REVERSE):
            runs.tape(action.capo + 1, action.capo + 1)
            if action.type == action_types.LASTFW:
                runs.turn()
            runs.backward(action.capo + 1, action.capo + 1)
    return runs.schedule()


_MAKERS: dict[str, Callable[[Any, int, int], Any]] = {
    "Multistage": lambda package, n, s: package.MultistageCheckpointSchedule(n, s, 0),
    "Revolve": lambda package, n, s: package.Revolve(n, s),
    "HRevolve": lambda package, n, s: package.HRevolve(n, s, 0),
    "Mixed": lambda package, n, s: package.MixedCheckpointSchedule(n, s),
}

PEERS: dict[str, Peer] = {
    "pyrevolve": Peer("pyrevolve", "pyrevolve", _pyrevolve_actions, _schedule_of_pyrevolve)
} | {
    name: Peer(name, "checkpoint-schedules", _checkpoint_schedules(make), _schedule_of_actions)
    for name, make in _MAKERS.items()
}
"""All peers by name; Mixed keeps a state or a tape in a slot, the others states."""
