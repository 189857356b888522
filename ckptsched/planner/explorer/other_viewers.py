"""A plan as files of other viewers: PyTorch's memory viewer, and Perfetto or Chrome's tracing."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from ...schedule.language import Backward, Copy, Drop, Forward, Schedule, Turn
from ...simulator.lifetimes import Lifetimes, Role, lifetimes
from ..plan_words import Planned, Workload
from .content import ROLES, stage_names

_FIRST_ADDRESS = 2**32
_GRAIN = 512  # bytes: addresses are multiples of it, as those of PyTorch's allocator
_OF_STAGE = {Role.STATE: "state", Role.TAPE: "tape", Role.GRADIENT: "gradient"}
_Event: TypeAlias = dict[str, Any]


def snapshot_of(plan: Planned) -> bytes:
    """The plan as a memory snapshot, pickled as `torch.cuda.memory._dump_snapshot` does.

    Each value is allocated and freed when the plan does so, at an address of its own: what the
    projection knows nothing of, such as fragmentation, is not made up. "Stacks" name the operation
    and the value. Times are the projected ones.
    """
    names = stage_names(plan.chain)
    lives = lifetimes(plan.chain, plan.schedule, plan.trace.timeline)
    words = [operation_words(names, x) for x in plan.schedule]
    starts = np.cumsum([0.0, *seconds_of(plan.chain, plan.schedule)])
    trace, blocks, place = list[_Event](), list[dict[str, Any]](), _FIRST_ADDRESS
    addresses: dict[int, int] = {}
    for p, born, row in _changes(lives):
        is_transient = row < 0
        size = int(lives.transient[p] if is_transient else lives.size[row])
        what = "the operation itself" if is_transient else value_words(names, lives, row)
        # What an operation makes is there from the next one on.
        at = p if is_transient else p - 1
        place_of = f"operation {at + 1}: {words[at]}" if at >= 0 else "before the step"
        time = float(starts[p + 1 if is_transient and not born else p])
        event: _Event = {"size": size, "stream": 0, "time_us": round(1e6 * time)}
        event["frames"] = [{"name": what, "filename": place_of, "line": 0}]
        if born:
            addresses[row] = place
            place += -(-size // _GRAIN) * _GRAIN
        event["addr"] = addresses[row]
        if born:
            trace.append({**event, "action": "alloc"})
            if not is_transient and lives.until[row] == len(plan.schedule):
                blocks.append(_block(event, size))
        else:
            trace += ({**event, "action": x} for x in ("free_requested", "free_completed"))
    data = {
        "segments": [_segment(place - _FIRST_ADDRESS, blocks)],
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
    }
    return pickle.dumps(data, protocol=4)  # the viewer's own reader knows this one


def _changes(lives: Lifetimes) -> Iterator[tuple[int, bool, int]]:
    """Operation, whether something begins or ends before it, and its row; -1 for the transient.

    What ends goes before what begins, so that the running sum is never above the plan's.
    """
    ends = np.argsort(lives.until, kind="stable")
    begun = ended = 0
    for p in range(len(lives.transient)):
        while ended < len(ends) and lives.until[ends[ended]] <= p:
            yield p, False, int(ends[ended])
            ended += 1
        while begun < len(lives.since) and lives.since[begun] <= p:
            yield p, True, begun
            begun += 1
        if lives.transient[p] > 0:
            yield p, True, -1
            yield p, False, -1


def _block(event: _Event, size: int) -> dict[str, Any]:
    return {
        "address": event["addr"],
        "size": -(-size // _GRAIN) * _GRAIN,
        "requested_size": size,
        "state": "active_allocated",
        "frames": event["frames"],
    }


def _segment(total: int, active: list[dict[str, Any]]) -> dict[str, Any]:
    """One segment with all addresses: blocks that outlive the step, and what is free between."""
    blocks, place = list[dict[str, Any]](), _FIRST_ADDRESS
    end = {"address": _FIRST_ADDRESS + total, "size": 0}
    for block in [*active, end]:
        if block["address"] > place:
            free = {"address": place, "size": block["address"] - place, "requested_size": 0}
            blocks.append({**free, "state": "inactive", "frames": []})
        if block["size"]:
            blocks.append(block)
        place = block["address"] + block["size"]
    held = sum(block["size"] for block in active)
    return {
        "device": 0,
        "address": _FIRST_ADDRESS,
        "total_size": total,
        "allocated_size": held,
        "active_size": held,
        "requested_size": sum(block["requested_size"] for block in active),
        "stream": 0,
        "segment_type": "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }


def chrome_trace_of(plan: Planned) -> dict[str, Any]:
    """The plan as Chrome's trace events: a track each for runs, runs again and backwards; bytes."""
    names = stage_names(plan.chain)
    lives = lifetimes(plan.chain, plan.schedule, plan.trace.timeline)
    levels = lives.bytes_by_role()
    used = [role for role in Role if levels[role].any()]
    tracks = {1: "forward", 2: "forward again", 3: "backward and loss"}
    events: list[_Event] = [_meta("process_name", 0, "ckptsched, projected")]
    events += (_meta("thread_name", track, name) for track, name in tracks.items())
    now, seen = 0.0, set[int]()
    pairs = zip(plan.schedule, seconds_of(plan.chain, plan.schedule), strict=True)
    for p, (operation, seconds) in enumerate(pairs):
        args = {ROLES[role]: int(levels[role, p]) for role in used}
        args["Transient"] = int(lives.transient[p])
        events.append({"ph": "C", "pid": 1, "name": "bytes", "ts": 1e6 * now, "args": args})
        if isinstance(operation, (Forward, Backward, Turn)):
            track = 3
            if isinstance(operation, Forward):
                track = 2 if operation.stage in seen else 1
                seen.add(operation.stage)
            shown = {"operation": p + 1, "bytes": int(plan.trace.timeline[p])}
            name = operation_words(names, operation)
            span = {"ts": 1e6 * now, "dur": 1e6 * seconds, "args": shown}
            events.append({"ph": "X", "pid": 1, "tid": track, "name": name, **span})
        now += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(kind: str, track: int, name: str) -> _Event:
    return {"ph": "M", "pid": 1, "tid": track, "name": kind, "args": {"name": name}}


def seconds_of(chain: Workload, schedule: Schedule) -> list[float]:
    """Projected seconds of each operation of a valid schedule; copies and drops take none."""
    options = dict[int, int]()
    found = []
    for operation in schedule:
        match operation:
            case Forward(i, True, option):
                options[i] = option
                found.append(chain.stages[i - 1].tapes[option].forward_seconds)
            case Forward(i):
                found.append(chain.stages[i - 1].forward_seconds)
            case Backward(i):
                found.append(chain.stages[i - 1].tapes[options[i]].backward_seconds)
            case Turn():
                found.append(chain.loss_seconds)
            case _:
                found.append(0.0)
    return found


def operation_words(names: list[str], operation: object) -> str:
    """An operation in words, such as "backward of block.0".

    Args:
        names: Of the stages, see `content.stage_names`.
        operation: The operation.
    """
    match operation:
        case Forward(i, tape):
            return f"forward{' with tape' if tape else ''} of {names[i - 1]}"
        case Backward(i):
            return f"backward of {names[i - 1]}"
        case Turn():
            return "the loss"
        case Drop(value):
            return f"drop the {value.kind.name.lower()} of {_named(names, value.stage)}"
        case Copy(value, _, target):
            what = f"the {value.kind.name.lower()} of {_named(names, value.stage)}"
            return f"copy {what} to the {target.name.lower()}"
    raise TypeError(operation)


def value_words(names: list[str], lives: Lifetimes, row: int) -> str:
    """What lives, such as "tape of block.0".

    Args:
        names: Of the stages.
        lives: The lifetimes.
        row: Which of them.
    """
    role, stage = Role(int(lives.role[row])), int(lives.stage[row])
    if role in _OF_STAGE:
        return f"{_OF_STAGE[role]} of {_named(names, stage)}"
    if role is Role.PARAMETERS:
        return f"parameter gradients of {_named(names, stage)}"
    return ROLES[role].lower()


def _named(names: list[str], stage: int) -> str:
    return names[stage - 1] if stage else "the input"
