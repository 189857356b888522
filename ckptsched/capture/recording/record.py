"""How any module becomes a recording: passes over one batch until two of them agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from inspect import isfunction
from typing import Any, NoReturn

import torch

from ...base.errors import ProfileError
from ...tensors.pytree import State, equal_constants
from ...torch_state.replay_context import Autocast, OneWay, RandomState, Recomputing
from ..inspection import Inspection
from ..model_state import left_as_it_was
from .attributes import attributes_of, is_outside
from .calls import Fixed, Place, RecordedCall, Source
from .one_pass.carried import with_carried
from .one_pass.marks import is_function
from .one_pass.recorder import Recorder
from .one_pass.saved import GoesBackError
from .preparation import (
    caches_off,
    fails,
    forget_cached,
    refuse_unready,
    set_up,
    without_cache,
)
from .recording import Bound, Recording, layouts_of, part_of

# Each pass may find more that must be called whole, most often the module around it.
_MOST_PASSES = 12


def record(
    inspection: Inspection, inputs: State, device: torch.device, like: Recording | None = None
) -> Recording:
    """Record what a model does with a batch; the model is left as it was.

    It runs until two passes in a row agree. Between them Python's generators go on, so that what
    hangs on those is found. Where a recording for other sizes was made so, one pass that agrees
    with it but for sizes will do.

    Args:
        inspection: Any module; its `forward` is recorded, its own hooks are not.
        inputs: What it is called with, as `(args, kwargs)`, taken apart.
        device: Where it lies.
        like: A recording of the same model for a batch of other sizes.

    Raises:
        ProfileError: All of the model would have to be called whole, its forward changes
            parameters, or no two passes agree.
    """
    refuse_unready(inspection.model)
    inputs = inputs.with_own_arrays()
    with caches_off(inspection.model, inputs):
        recorder, output, whole = _passes(inspection, without_cache(inputs), device, like)
    return _recording(recorder, inspection, inputs, output, whole)


def _recording(
    recorder: Recorder,
    inspection: Inspection,
    inputs: State,
    output: State,
    whole: Mapping[str, str],
) -> Recording:
    recording = Recording(
        calls=tuple(recorder.calls),
        given=recorder.given,
        inputs=State((), inputs.tree),
        layouts=layouts_of(inputs),
        returned=recorder.returned,
        output=output,
        guards=tuple(recorder.guards),
        attributes=attributes_of(inspection.model),
        kept=dict(recorder.kept),
        whole=whole,
        unset=recorder.unset,
    )
    return with_carried(recording, inspection.model)


def _passes(
    inspection: Inspection, inputs: State, device: torch.device, like: Recording | None
) -> tuple[Recorder, State, dict[str, str]]:
    """Passes until two agree: the last one, its result, and what is called whole and why."""
    whole: dict[str, str] = {} if like is None else dict(like.whole)
    before: Recorder | None = None
    asked = False  # whether the model sets itself up
    for _ in range(_MOST_PASSES):
        left = {} if before is None else before.left
        recorder, output = _one_pass(inspection, inputs, device, whole, left)
        if recorder.refusal:
            raise ProfileError(f"the model cannot be recorded: {recorder.refusal}")
        if (recorder.changed or recorder.leaves_elsewhere) and not asked:
            asked = True
            if set_up(inspection, inputs, device):
                before = None
                continue
        for name, path in recorder.changed.items():
            recorder.marks.mark(f"attribute {name!r} changes in a forward pass", path)
        marked = recorder.marks.marked
        # Not a pass that found what the one before has left.
        if like is not None and not marked and not recorder.left and not left:
            if is_same_but_for_sizes(like, _recording(recorder, inspection, inputs, output, whole)):
                return recorder, output, whole
            like = None
        if not marked and before is not None:
            unlike = _difference(before, recorder)
            if unlike is not None and left:
                # It goes by what the pass before has left, as a network that makes its first state
                # itself: this is the way that it takes as long as there is nothing.
                recorder, output = _one_pass(inspection, inputs, device, whole, {})
                marked, recorder.unset = recorder.marks.marked, tuple(left)
                unlike = "" if marked else _difference(before, recorder)
            if unlike is None:
                return recorder, output, whole
            marked = marked or {unlike: "two passes over the same batch took different ways"}
        before = None if marked else recorder
        _widen(whole, marked)
    raise ProfileError(
        f"the model was run {_MOST_PASSES} times on one batch and took another way each time; "
        f"called whole so far: {', '.join(sorted(whole)) or 'nothing'}"
    )


def _widen(whole: dict[str, str], marked: Mapping[str, str]) -> None:
    """Add modules; where one is whole already, what happens is in the module around it."""
    for path, why in marked.items():
        if is_function(path):
            whole[path] = why
            continue
        while path in whole and path:
            path = path.rpartition(".")[0]
        if not path:
            raise ProfileError(
                f"the model cannot be taken apart: {why}, and does so outside of any part that "
                "could be one stage; move the lines that do it into a module of their own, or, as "
                "of a loss that the model computes, out of its forward (a model that computes one "
                "where it is given labels may be called without)"
            )
        whole[path] = why


def _one_pass(
    inspection: Inspection,
    inputs: State,
    device: torch.device,
    whole: Mapping[str, str],
    left: Mapping[Place, Any],
) -> tuple[Recorder, State]:
    """One pass, after which all is as it was but Python's own random numbers.

    What the pass before has left in attributes lies there: a model may look at it.
    """
    output, before = State(()), attributes_of(inspection.model)
    random = RandomState.take(device, inspection.generators(inputs.constants()))
    with (
        left_as_it_was(inspection, random, lazily=True) as (state, _),
        Autocast.take(device).again(),
        OneWay(),
        Recomputing(),
        torch.enable_grad(),
    ):
        for place, value in left.items():
            place.put(part_of(inspection.model, place.path), value)
        forget_cached(inspection.model)
        recorder = Recorder(inspection.model, whole)
        fresh = inputs.replaced(
            leaf.detach().requires_grad_(leaf.requires_grad) for leaf in inputs.leaves
        )
        try:
            output = recorder.run(fresh, device)
        except GoesBackError:
            pass  # the module around is marked
        except Exception as error:
            if not recorder.refusal:
                _refuse_failing(recorder, inspection, inputs, error)
        after = attributes_of(inspection.model)
        other = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
        # What libraries keep outside of the model, such as a cache, is no state of it.
        other = [name for name in other if not is_outside(name)]
        _note_changed({*state.rebound(), *other}, recorder, inspection, whole)
        if recorder.guards and not recorder.marks.marked:
            recording = _recording(recorder, inspection, inputs, output, whole)
            _mark_what_moves_on(recorder, recording, inspection, inputs)
        if state.written():
            raise ProfileError(f"{state.written()} is changed by the model's forward pass")
    return recorder, output


def _refuse_failing(
    recorder: Recorder, inspection: Inspection, inputs: State, error: Exception
) -> NoReturn:
    """Raise the error of a pass, which is the model's own if that fails without us, too."""
    if fails(inspection.model, inputs):
        raise error
    where = recorder.marks.scopes[-1] or "the model itself"
    raise ProfileError(
        f"the model cannot be recorded: {where} runs by itself, and fails while it is "
        f"recorded with {type(error).__name__}: {error}"
    ) from error


def _note_changed(
    names: Collection[str], recorder: Recorder, inspection: Inspection, whole: Mapping[str, str]
) -> None:
    """Note which attributes a pass has changed where nothing is called whole and none are kept."""
    kept = {str(place) for place in recorder.kept}
    for name in sorted(names):
        path = _owner(inspection, name)
        if name not in kept and not _is_within(path, whole):
            recorder.changed[name] = path


def _mark_what_moves_on(
    recorder: Recorder, recording: Recording, inspection: Inspection, inputs: State
) -> None:
    """Mark where a guard would find something else on the same batch in the next step.

    A place in a queue that goes on with every batch is no decision that a recording can hold.
    """
    bound = Bound(recording, inspection.model)
    # What is carried is another each time: what hangs on it cannot be asked.
    values = dict(zip(recording.given, inputs.leaves, strict=False))
    with torch.no_grad():
        for guard in recording.guards:
            try:
                moves = bound.ask(guard, values) != guard.found
            except KeyError:
                moves = True
            if moves:
                why = f"{guard.read.name} reads a value that each forward changes"
                recorder.marks.mark(why, guard.read.scope)


def _is_within(path: str, whole: Mapping[str, str]) -> bool:
    return any(path == w or path.startswith(f"{w}.") for w in whole)


def _owner(inspection: Inspection, name: str) -> str:
    """The path of the module that an attribute belongs to."""
    path = name.rpartition(".")[0]
    while path not in inspection.paths:
        path = path.rpartition(".")[0]
    return path


def is_same_but_for_sizes(one: Recording, other: Recording) -> bool:
    """Whether two recordings make the same calls, with other whole numbers where sizes are others.

    Whole numbers may differ as sizes of the arguments do: in the same ratio, or by as much.

    Args:
        one: For one batch.
        other: For another of the same structure.
    """
    if one.whole != other.whole or one.inputs.tree != other.inputs.tree:
        return False
    if (one.carried, one.unset) != (other.carried, other.unset):
        return False
    pairs = {
        pair
        for a, b in zip(one.layouts, other.layouts, strict=True)
        for pair in zip(a[0], b[0], strict=False)
        if pair[0] != pair[1]
    }
    guards = zip(one.guards, other.guards, strict=False)
    return (
        len(one.calls) == len(other.calls)
        and len(one.guards) == len(other.guards)
        and all(_alike(a, b, pairs) for a, b in zip(one.calls, other.calls, strict=True))
        and all(_alike(a.read, b.read, pairs) and a.after == b.after for a, b in guards)
        and len(one.returned) == len(other.returned)
        and all(map(_same_source, one.returned, other.returned))
    )


def _follows_from_sizes(one: Any, other: Any, pairs: Collection[tuple[int, int]]) -> bool:
    if type(one) is not int or type(other) is not int:
        return False
    return any(one * b == other * a or one - other == a - b for a, b in pairs)


def _difference(one: Recorder, other: Recorder) -> str | None:
    """The path of the module in which two passes differ first; None where they are alike."""
    for a, b in zip(one.calls, other.calls, strict=False):
        if not _alike(a, b):
            return b.scope
    if len(one.calls) != len(other.calls):
        longer = max(one.calls, other.calls, key=len)
        return longer[min(len(one.calls), len(other.calls))].scope
    same = len(one.returned) == len(other.returned) and all(
        map(_same_source, one.returned, other.returned)
    )
    return None if same else ""


def _alike(one: RecordedCall, other: RecordedCall, sizes: Collection[tuple[int, int]] = ()) -> bool:
    return (
        one.target == other.target
        and _same_constants(one.given, other.given, sizes)
        and len(one.reads) == len(other.reads)
        and all(map(_same_source, one.reads, other.reads))
        and (one.makes, one.around, one.writes) == (other.makes, other.around, other.writes)
    )


def _same_constants(one: State, other: State, sizes: Collection[tuple[int, int]] = ()) -> bool:
    """Whether two calls were given the same besides tensors; functions count by their code.

    Args:
        one: What one call was given.
        other: What the other was given.
        sizes: Pairs of sizes of which whole numbers may follow; none for the same.
    """
    if one.tree == other.tree:
        return True
    mine, theirs = [*one.constants()], [*other.constants()]
    return len(mine) == len(theirs) and all(
        equal_constants(a, b)
        or (isfunction(a) and isfunction(b) and _same_code(a, b))
        or _follows_from_sizes(a, b, sizes)
        or (
            isinstance(a, torch.Size)
            and isinstance(b, torch.Size)
            and len(a) == len(b)
            and all(x == y or _follows_from_sizes(x, y, sizes) for x, y in zip(a, b, strict=True))
        )
        for a, b in zip(mine, theirs, strict=True)
    )


def _same_code(one: Any, other: Any) -> bool:
    same = one.__code__ is other.__code__ and one.__defaults__ == other.__defaults__
    return same and not one.__closure__


def _same_source(one: Source, other: Source) -> bool:
    if isinstance(one, Fixed) and isinstance(other, Fixed):
        return one.tensor is other.tensor  # else it is made on the way, unseen
    return one == other
