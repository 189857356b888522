"""Where a recording may be cut into stages, and where it is worth it.

Between two calls lie the tensors that calls before have made and calls after read: the live set.
A cut hands it on as the state. Every forward pass is a chain in this way: skip connections, masks
and tables ride along as parts of the state, and a storage counts once however many states hold it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...recompute.fsdp import has_hooks
from ...tensors.pytree import State, storages
from ...torch_state.replay_context import RandomState
from ..policies import keep
from .calls import Fixed, Numbered, RecordedCall, StagePath
from .functions import EFFECTS
from .recording import Bound, Recording

# Of cuts that lie so near to each other, as a part of the forward's work, the leanest is enough.
_NEAR = 1 / 400
# Planning takes a time that grows with the square of the stages and more: some ten seconds for so
# many. Where there would be more, what counts as near is widened step by step.
_MOST_CUTS, _WIDER = 300, 1.25
# Operations of floating point that take as long as moving one byte, on most machines within ten.
_OPERATIONS_A_BYTE = 10


@final
@dataclass(frozen=True)
class CallCosts:
    """What the calls of a recording take, in the order in which they run."""

    work: tuple[int, ...]
    """For each call its operations of floating point, and those for the bytes that it moves. It is
    counted and not timed, so that a model is cut alike each time, and equal layers are."""
    live_bytes: tuple[int, ...]
    """Before each call, and after the last, the bytes of the storages of the live set."""
    legal: tuple[bool, ...]
    """Before each call whether a cut may lie there; the first is none."""
    cheap: tuple[bool, ...] = ()
    """For each call whether a backward may make it again rather than keep what it made: it computes
    no products, draws nothing, decides nothing, and changes nothing but what it is given."""
    makes_bytes: tuple[bool, ...] = ()
    """For each call whether it makes storages of its own; views make none."""
    why_not: tuple[str, ...] = ()
    """For each call why a backward may not make it again, whatever it costs; empty where it may."""
    called: tuple[frozenset[Any], ...] = ()
    """For each call the operators that it has run, and the functions of torch that it has called;
    of a module's only where they were asked for."""
    kept: frozenset[int] = frozenset()
    """The calls that have made, or written to, what the model keeps."""
    floats: tuple[bool, ...] = ()
    """For each call whether all that it makes are floating point numbers."""


def measure(
    recording: Recording, model: nn.Module, tensors: Sequence[Tensor], *, closely: bool = False
) -> CallCosts:
    """Run a recording call by call; who calls this puts the model back.

    Args:
        recording: The recording.
        model: The model that it is of.
        tensors: The tensors of the arguments.
        closely: Whether to see which functions modules call, and whether operators that may draw
            random numbers do.
    """
    bound, last = Bound(recording, model), recording.last_read
    values = dict(zip(recording.given, tensors, strict=True))
    homes, seen, kept = _Homes(), list[_Seen](), set[int]()
    device = tensors[0].device if closely else None
    homes.note(values, values, -1)
    with saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)):
        for k, call in enumerate(recording.calls):
            given = [bound.tensor(source, values) for source in call.reads]
            if call.target is keep.kept:
                kept.update(homes.made_by(given))
            seen.append(_look_on(bound, k, call, values, given, homes, device))
            del given
            for number in {*call.values, *call.makes}:
                if last.get(number) == k:
                    values.pop(number, None)
            homes.forget_all_but(values.values())
    calls = len(recording.calls)
    legal = [False, *[True] * (calls - 1)]
    for home, end in homes.written.items():
        for k in range(homes.made[home] + 1, end + 1):
            legal[k] = False
    return CallCosts(
        work=tuple([each.work for each in seen]),
        live_bytes=tuple([homes.bytes_of(recording.live(k)) for k in range(calls + 1)]),
        legal=tuple(legal),
        cheap=tuple([each.cheap for each in seen]),
        makes_bytes=tuple([each.makes_bytes for each in seen]),
        why_not=tuple([each.why_not for each in seen]),
        called=tuple([each.called for each in seen]),
        kept=frozenset(kept),
        floats=tuple([each.floats for each in seen]),
    )


class _Seen(NamedTuple):
    """What `CallCosts` says of one call."""

    work: int
    cheap: bool
    makes_bytes: bool
    why_not: str
    called: frozenset[Any]
    floats: bool


def _look_on(
    bound: Bound,
    k: int,
    call: RecordedCall,
    values: dict[int, Tensor],
    given: Sequence[Tensor],
    homes: _Homes,
    device: torch.device | None,
) -> _Seen:
    """Make a call, and note where what it makes and changes is at home.

    Args:
        bound: The recording, bound to a model.
        k: The call, by index.
        call: The call.
        values: All that are there, to which those that it makes are added.
        given: The tensors that it reads.
        homes: Where values are at home.
        device: The one whose random numbers show whether it draws, where that is looked at closely.
    """
    before = [tensor._version for tensor in given]
    random = None if device is None else RandomState.take(device)
    with nullcontext() if device is None else _Functions() as functions, _Work() as counted:
        bound.run(k, values)
    if device is not None and counted.draws:
        counted.draws = random != RandomState.take(device)
    made = len(homes.made)
    homes.note(values, [n for n in call.makes if n >= 0], k)
    makes_bytes = len(homes.made) > made
    changed = [t._version != version for t, version in zip(given, before, strict=True)]
    for tensor, is_other in zip(given, changed, strict=True):
        if is_other or call.target in EFFECTS:
            homes.note_write(tensor, k)
    why_not = _why_not_again(call, bound.callee(k), changed, counted)
    floats = all(values[n].is_floating_point() for n in call.makes if n >= 0)
    plain = not (counted.multiplies or counted.may_draw or why_not)
    more = () if functions is None else functions.seen
    return _Seen(
        work=counted.total,
        cheap=plain and floats,
        makes_bytes=makes_bytes,
        why_not=why_not,
        called=frozenset((call.target, *counted.operators, *more)),
        floats=floats,
    )


def _why_not_again(call: RecordedCall, callee: Any, changed: Sequence[bool], counted: _Work) -> str:
    """Why a call cannot be made again in the backward without a trace; empty where it can.

    Args:
        call: The call.
        callee: The module or function that it calls.
        changed: For each tensor that it is given whether it has changed that in place.
        counted: What it has run.
    """
    if call.target is keep.kept:
        return ""
    if counted.draws:
        return "draws random numbers"
    if counted.foreign:
        return f"runs {counted.foreign}, an operator of others than torch"
    if isinstance(call.target, StagePath) or call.why_whole:
        return f"is called whole, as {call.why_whole or 'it is a stage of its module'}"
    if call.target in EFFECTS:
        return "does something to a tensor and gives none"
    if isinstance(callee, nn.Module):
        if not type(callee).__module__.startswith("torch.nn.modules."):
            return f"runs a {type(callee).__name__}, which is no module of torch.nn"
        if has_hooks(callee) or is_parametrized(callee):
            return "has hooks or parametrizations"
    elif isinstance(call.target, type):
        return "is a custom autograd Function, which may do anything"
    elif not is_of_torch(callee):
        return "is no function of torch"
    if any(isinstance(source, Fixed) for source in call.reads):
        return "reads a tensor that is neither the model's nor made in its forward"
    written = [s for s, is_new in zip(call.reads, changed, strict=True) if is_new]
    if all(isinstance(s, Numbered) and s.number in call.writes for s in written):
        return ""
    return "changes a tensor of the model's in place"


def is_of_torch(function: Any) -> bool:
    """Whether torch has defined a function.

    Args:
        function: The function.
    """
    home = getattr(function, "__module__", None) or getattr(
        getattr(function, "__objclass__", None), "__module__", ""
    )
    return str(home or "torch").split(".")[0] == "torch"


@final
class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what operators compute and move."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.operators: set[Any] = set()
        """Those that have run, each as itself and as what torch calls it by."""
        self.multiplies = False
        """Whether one has computed products."""
        self.may_draw = self.draws = False
        """Whether one is said to draw random numbers, and whether it has, as far as is known."""
        self.foreign = ""
        """One that is not torch's."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ):
            return result  # a view moves nothing
        self.operators.update((func, func._overloadpacket))
        formula = _formulas().get(func._overloadpacket)
        if func.namespace not in ("aten", "prims"):
            self.foreign = str(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.may_draw = self.draws = True
        if formula is not None:
            self.multiplies = True
            self.total += int(formula(*args, **kwargs, out_val=result))
        moved = State.of((args, kwargs, result), opaque=True).leaves
        self.total += _OPERATIONS_A_BYTE * sum(t.nbytes for t in moved if t.layout == torch.strided)
        return result


@final
class _Functions(TorchFunctionMode):
    """Sees which functions of torch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def _formulas() -> dict[Any, Any]:
    """From an operator to its operations of floating point, for those that torch knows."""
    try:
        from torch.utils.flop_counter import flop_registry
    except ImportError:  # no public name promises it
        return {}
    return flop_registry


@final
class _Homes:
    """The storages of values, each with a number of its own.

    What torch calls a storage by may be that of another once it is gone.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        """For each storage the call that has made it."""
        self.written: dict[int, int] = {}
        """For some the last call that has written to them."""
        self._by: dict[int, list[int]] = {}  # the calls that have made each, or written to it
        self._sizes: list[int] = []
        self._of_value: dict[int, int] = {}
        self._known: dict[int, int] = {}  # those that are there, by what torch calls them

    def note(self, values: dict[int, Tensor], numbers: Iterable[int], k: int) -> None:
        """Note values that a call has made.

        Args:
            values: All that are there.
            numbers: Theirs.
            k: The call, by index.
        """
        for number in numbers:
            for name, parts in storages([values[number]]).items():
                home = self._known.setdefault(name, len(self.made))
                if home == len(self.made):
                    self.made.append(k)
                    self._by[home] = [k]
                    self._sizes.append(parts[0].untyped_storage().nbytes())
                self._of_value[number] = home

    def note_write(self, tensor: Tensor, k: int) -> None:
        """Note that a call has written to a tensor; one of the model's own does not matter."""
        for name in storages([tensor]).keys() & self._known.keys():
            self.written[self._known[name]] = k
            self._by[self._known[name]].append(k)

    def made_by(self, tensors: Iterable[Tensor]) -> set[int]:
        """The calls that have made the storages of some tensors, or written to them."""
        known = storages(tensors).keys() & self._known.keys()
        return {k for name in known for k in self._by[self._known[name]] if k >= 0}

    def forget_all_but(self, values: Iterable[Tensor]) -> None:
        """Give the names of storages free that are gone."""
        there = storages(values).keys()
        self._known = {name: home for name, home in self._known.items() if name in there}

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Bytes of the storages of some values, each once."""
        return sum(
            self._sizes[h] for h in {self._of_value[n] for n in numbers if n in self._of_value}
        )


def every_cut(measured: CallCosts) -> tuple[int, ...]:
    """All places where a cut may lie."""
    return tuple(k for k, legal in enumerate(measured.legal) if legal)


def lean_cuts(measured: CallCosts) -> tuple[int, ...]:
    """The leanest of all cuts, no two of them within a small part of the work of each other."""
    return _leanest(measured, every_cut(measured), _NEAR)


def _leanest(measured: CallCosts, cuts: Sequence[int], near: float) -> tuple[int, ...]:
    """The leanest of some cuts, and then of the others those beside which none was chosen.

    Args:
        measured: What the calls take.
        cuts: The cuts, in ascending order.
        near: What counts as beside, as a part of the work of all calls.
    """
    at, live = [0], measured.live_bytes
    for work in measured.work:
        at.append(at[-1] + work)
    reach = at[-1] * near
    chosen: list[int] = []  # in ascending order
    # The leanest first, so that of many equal ones some are left at a distance from each other.
    for cut in sorted(cuts, key=lambda k: (live[k], k)):
        place = bisect(chosen, cut)
        beside = chosen[max(0, place - 1) : place + 1]
        if all(abs(at[other] - at[cut]) > reach for other in beside):
            chosen.insert(place, cut)
    return tuple(chosen)


def smallest_cuts(measured: CallCosts) -> tuple[int, ...]:
    """Those of all cuts where the live bytes have a local minimum; of equal ones the first."""
    cuts, live = every_cut(measured), measured.live_bytes
    chosen = []
    for k, cut in enumerate(cuts):
        falls = k == 0 or live[cuts[k - 1]] > live[cut]
        after = next((live[c] for c in cuts[k:] if live[c] != live[cut]), live[cut] + 1)
        if falls and after > live[cut]:
            chosen.append(cut)
    return tuple(chosen)


def dear_cuts(measured: CallCosts) -> tuple[int, ...]:
    """One cut between calls that are dear to make again: that with the fewest live bytes.

    Of equal ones it is the first. What lies between are cheap calls, such as norms and activations;
    they come with the product that reads what they make, so that a lean tape can leave that out.
    """
    live, chosen = measured.live_bytes, []
    before: int | None = None  # the best cut since the last dear call
    for k, legal in enumerate(measured.legal):
        if legal and k and (before is None or live[k] < live[before]):
            before = k
        if not measured.cheap[k] and before is not None:
            chosen.append(before)
            before = None
    return tuple(chosen)


def cuts_beside_whole(recording: Recording, measured: CallCosts) -> tuple[int, ...]:
    """Those of all cuts that lie right before or after a part that is called whole.

    What such a part computes may hang on draws, so that what it has taken in one run says little
    about where to cut. And the profile looks for the most that a stage takes by other draws: two
    parts in one stage take it together, which few draws show.

    Args:
        recording: The recording.
        measured: What its calls take.
    """
    whole = [k for k, call in enumerate(recording.calls) if call.why_whole]
    beside = sorted({edge for k in whole for edge in (k, k + 1)})
    return tuple(k for k in beside if k < len(recording.calls) and measured.legal[k])


def cuts_beside_once(measured: CallCosts, once: Sequence[bool]) -> tuple[int, ...]:
    """Those of all cuts that lie right before or after a stretch of calls that run once a step.

    A plan keeps the tape of a stage with such a call, so that it had better have little besides.

    Args:
        measured: What the calls take.
        once: For each whether it is one of those.
    """
    edges = [k for k in range(1, len(once)) if once[k] != once[k - 1]]
    return tuple(k for k in edges if measured.legal[k])


def candidate_cuts(measured: CallCosts) -> tuple[tuple[int, ...], ...]:
    """The ways to cut of which one has the best plan, as far as known: each once, finest first."""
    ways = (lean_cuts(measured), dear_cuts(measured))
    return tuple(dict.fromkeys(_not_too_many(measured, cuts) for cuts in ways))


def _not_too_many(measured: CallCosts, cuts: tuple[int, ...]) -> tuple[int, ...]:
    """The leanest of some cuts, of which a deep network has more than are planned in seconds."""
    near = _NEAR
    while len(cuts) > _MOST_CUTS:
        near *= _WIDER
        cuts = _leanest(measured, cuts, near)
    return cuts
