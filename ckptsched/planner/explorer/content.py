"""What a page of the explorer holds, as data: the network, and each plan with all that lives when.

Columns of whole numbers go by differences where neighbours are alike, and are packed by gzip:
20 plans of 1,000 stages are to fit into a megabyte. `assets/data.js` reads what is written here.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from ...base.budget import format_bytes
from ...base.errors import PlanMismatchError
from ...base.json_files import printable
from ...schedule.language import Code
from ...simulator.lifetimes import Role, lifetimes
from ...workload.chain import Chain
from ...workload.graph import Graph
from ..plan_words import Planned, Workload, certificate_of, kind_of, words_of_peak

ROLES = {
    Role.STATE: "States (checkpoints)",
    Role.TAPE: "Tapes",
    Role.GRADIENT: "Gradients of states",
    Role.PARAMETERS: "Parameter gradients",
    Role.OUTPUT: "Output and loss",
    Role.RANDOM: "Random states",
    Role.BUFFERS: "Copies of buffers",
    Role.KEPT: "Hidden state",
}
"""What the page calls each role."""
# The layer of a recorded stage's first call: "17:transformer.h.0.ln_1 to addmm in transformer.h.0".
_MODULE = re.compile(
    r"\d+:(?:.*? in )?(?:((?:[^\s.]+\.)*?\d+)(?:[.\s]|$)|([^\s.]+)(?:[.\s]|$)|(\S+))"
)


class Compared(Protocol):
    """A step that was run under a plan, beside one of plain autograd."""

    @property
    def peak_bytes(self) -> int:
        """Peak of the step under the plan."""

    @property
    def seconds(self) -> float:
        """Its seconds; 0 where it was not timed."""

    @property
    def plain_seconds(self) -> float:
        """Seconds of plain autograd."""

    @property
    def max_gradient_difference(self) -> float:
        """Largest absolute difference of any gradient."""

    @property
    def ok(self) -> bool:
        """Whether all was as promised."""

    @property
    def timeline_bytes(self) -> Sequence[int]:
        """Bytes at most while each operation ran; empty where that was not measured."""


class Verified(Protocol):
    """What `verify` gives."""

    @property
    def measured(self) -> Compared:
        """The step under the plan."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A plan that the page shows."""

    plan: Planned
    """The plan."""
    measured: Compared | None = None
    """What a step under it took; None where none was run."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What the picture of the trade-off has besides the plans."""

    knee: int | None = None
    """Which of the plans is the knee."""
    baselines: tuple[tuple[str, int, float], ...] = ()
    """Rules of thumb: name, peak in bytes, seconds."""
    steps: tuple[tuple[int, float], ...] = ()
    """All steps of the front that are known, the least first: bytes, and seconds of the step."""


def page_data(
    chain: Workload, shown: Sequence[Shown], front: Front, selected: int
) -> dict[str, Any]:
    """All that a page holds, as JSON data.

    Args:
        chain: What was planned.
        shown: The plans, of the least budget first.
        front: What the trade-off has besides.
        selected: Which of the plans is shown first.
    """
    first = shown[0].plan
    return {
        "title": printable(chain.name) or f"{kind_of(chain)} of {len(chain)} stages",
        "kind": kind_of(chain),
        "stages": len(chain),
        "exact": chain.has_ledger,
        "storeAllBytes": first.store_all_bytes,
        "storeAllSeconds": chain.store_all_seconds,
        "leastBudgetBytes": first.least_budget_bytes,
        "inputLayout": layout_of(chain, 0),
        "roles": [ROLES[role] for role in Role],
        "network": packed(_network(chain)),
        "plans": [_plan(each) for each in shown],
        "selected": selected,
        "knee": front.knee,
        "baselines": [[printable(name), size, taken] for name, size, taken in front.baselines],
        "steps": [[size, taken] for size, taken in front.steps],
    }


def layout_of(chain: Workload, i: int) -> str:
    """Shape and dtype of a state, such as "float32[8, 64]"; empty where they are not known."""
    if isinstance(chain, Graph):
        return _layout_of_own(chain, i)
    layouts = chain.layouts
    if i < len(layouts):
        return printable(layouts[i])
    if i == 0 and chain.signature and chain.signature.input_dtype:
        signature = chain.signature
        dtype = signature.input_dtype.removeprefix("torch.")
        return f"{dtype}{list(signature.input_shape)}"
    return ""


def _layout_of_own(graph: Graph, i: int) -> str:
    """That of what a stage itself makes, where the chain hands on nothing besides."""
    if graph.lined is None:
        return ""
    own, whole = (x.arrays.state_bytes[i] for x in (graph, graph.lined))
    return layout_of(graph.lined, i) if own == whole or i == len(graph) else ""


def packed(data: Any) -> str:
    """JSON data as base64 of gzip, the same each time."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def stage_names(chain: Workload) -> list[str]:
    """Names of all stages for people, as `stage_name` gives them, in one pass."""
    if not isinstance(chain, Chain) or not chain.blocks:
        return [chain.stage_name(i) for i in range(1, len(chain) + 1)]
    names = []
    for block in chain.blocks:
        stages = chain.stages[block.first - 1 : block.last]
        same = len(stages) > 1 and len({stage.name for stage in stages}) == 1
        for k, stage in enumerate(stages):
            label = printable(".".join(part for part in (block.name, stage.name) if part))
            names.append(f"{label}[{k}]" if same else label)
    return names


def blocks_shown(chain: Workload) -> list[tuple[str, int, int]]:
    """Name, first and last stage of the blocks by which the network is shown.

    A recorded model is one block. Its stages say in which modules their calls are, and are put
    together by layer: up to the first number in a path, such as "transformer.h.5".
    """
    given = [(printable(b.name), b.first, b.last) for b in chain.blocks]
    if len(given) != 1:
        return given
    found: list[tuple[str, int, int]] = []
    for i, stage in enumerate(chain.stages, 1):
        match = _MODULE.match(stage.name)
        name = printable(match[1] or match[2] or match[3]) if match else ""
        name = "" if name == "Tensor" else name  # a method that is called outside of all modules
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], i)
        else:
            found.append((name, i, i))
    return found if 1 < len(found) <= len(chain) / 2 else given


def _network(chain: Workload) -> dict[str, Any]:
    """Names, blocks and figures of the stages, a column a figure."""
    columns = chain.arrays
    return {
        "names": stage_names(chain),
        "blocks": blocks_shown(chain),
        "layouts": _repeats([layout_of(chain, i) for i in range(1, len(chain) + 1)]),
        "forwardSeconds": columns.forward_seconds[1:].tolist(),
        "stateBytes": columns.state_bytes[1:].tolist(),
        "parameterBytes": columns.parameter_gradient_bytes[1:].tolist(),
        "lossSeconds": chain.loss_seconds,
        # Of each stage its tapes: forward seconds, backward seconds, bytes; equal ones once.
        "tapes": _repeats(
            [
                [[t.forward_seconds, t.backward_seconds, t.tape_bytes] for t in stage.tapes]
                for stage in chain.stages
            ]
        ),
    }


def _repeats(values: Iterable[Any]) -> dict[str, list[Any]]:
    """Values of which many are equal: the different ones, and which of them each is."""
    seen: dict[str, int] = {}
    kinds: list[Any] = []
    which = []
    for value in values:
        key = json.dumps(value)
        if key not in seen:
            seen[key] = len(kinds)
            kinds.append(value)
        which.append(seen[key])
    return {"kinds": kinds, "which": which}


def _plan(shown: Shown) -> dict[str, Any]:
    """A plan's figures in the open, and its operations and lifetimes packed."""
    plan, measured = shown.plan, shown.measured
    data: dict[str, Any] = {
        "budgetBytes": plan.budget_bytes,
        "budgetText": printable(plan.budget_text),
        "peakBytes": plan.peak_bytes,
        "peakPosition": plan.trace.peak_position,
        "peakWords": words_of_peak(plan),
        "seconds": plan.seconds,
        "overhead": plan.overhead,
        "gap": plan.gap,
        "lowerBoundSeconds": plan.lower_bound_seconds,
        "forwards": plan.forwards,
        "operations": len(plan.schedule),
        "solver": printable(plan.solver),
        "label": f"{format_bytes(plan.budget_bytes, budget=True)}, {plan.overhead:+.1%} time",
        "certificate": [printable(line) for line in certificate_of(plan)],
        "data": packed(_columns(plan, measured.timeline_bytes if measured else ())),
    }
    if measured is not None:
        data["measured"] = {
            "peakBytes": measured.peak_bytes,
            "seconds": measured.seconds,
            "plainSeconds": measured.plain_seconds,
            "gradientDifference": f"{measured.max_gradient_difference:.3g}",
            "ok": measured.ok,
        }
    return data


def _columns(plan: Planned, measured: Sequence[int]) -> dict[str, list[int]]:
    """Operations and what lives how long, a column each; see `assets/data.js`."""
    schedule = plan.schedule
    if len(measured) not in (0, len(schedule)):
        raise PlanMismatchError(
            f"the timeline that was measured has {len(measured)} operations, and the plan "
            f"{len(schedule)}: give what verify found of this plan"
        )
    lives = lifetimes(plan.chain, schedule, plan.trace.timeline)
    is_value = schedule.codes >= Code.COPY
    tiers = np.where(is_value, schedule.packed >> 16 & 0xFFFF, 0)
    # What follows the operation that makes it, as nearly all does, is told by that alone.
    return {
        "code": schedule.codes.tolist(),
        "kind": schedule.kinds.tolist(),
        "tiers": tiers.tolist() if tiers.any() else [],
        "stage": _differences(schedule.stages.astype(np.int64)),
        "transient": lives.transient.tolist(),
        "role": lives.role.tolist(),
        "of": _differences(lives.stage),
        "size": lives.size.tolist(),
        "since": _differences(lives.since),
        "until": (lives.until - lives.since).tolist(),
        "measured": _differences(np.array(measured, dtype=np.int64)),
    }


def _differences(values: npt.NDArray[np.int64]) -> list[int]:
    found: list[int] = np.diff(values, prepend=0).tolist()
    return found
