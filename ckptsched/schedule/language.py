"""The schedule: a small language of five operations.

A schedule says in which order stages run forward and backward and what is kept between
them. The simulator, the executor, the printer and the JSON writer interpret it; a solver
only decides. An operation takes 8 bytes, so that 100,000 steps fit in a few megabytes.
"""

from __future__ import annotations

import enum
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never, final, overload

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..base.errors import InvalidScheduleError


class Kind(enum.IntEnum):
    """The three kinds of value that are kept between operations."""

    STATE = 0
    TAPE = 1
    GRAD = 2


@final
@dataclass(frozen=True, slots=True)
class Value:
    """`state[i]`, `tape[i]` or `grad[i]`, the gradient with respect to state i."""

    kind: Kind
    stage: int

    def __str__(self) -> str:
        """Such as "state[3]"."""
        return f"{self.kind.name.lower()}[{self.stage}]"


@final
@dataclass(frozen=True, slots=True)
class Forward:
    """Reads as: from state[i-1], compute state[i]; with a tape, keep tape[i], which holds it.

    Where a stage offers several tapes, the option says which: 0 is its own.
    """

    stage: int
    tape: bool = False
    option: int = 0


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """Reads as: the forward pass is over; the caller has state[n] and gives grad[n]."""


@final
@dataclass(frozen=True, slots=True)
class Backward:
    """Reads as: from grad[i], tape[i] and state[i-1], compute grad[i-1]; the first two go."""

    stage: int


@final
@dataclass(frozen=True, slots=True)
class Copy:
    """Reads as: copy a value from one tier to another."""

    value: Value
    source: Tier
    target: Tier


@final
@dataclass(frozen=True, slots=True)
class Drop:
    """Reads as: forget a value."""

    value: Value
    tier: Tier = Tier.DEVICE


Operation: TypeAlias = Forward | Turn | Backward | Copy | Drop


class Code(enum.IntEnum):
    """First byte of a packed operation."""

    FORWARD = 0
    TAPED_FORWARD = 1
    TURN = 2
    BACKWARD = 3
    COPY = 4
    DROP = 5


# The same as plain numbers, which compiled code can hold.
FORWARD, TAPED, TURN, BACKWARD, COPY, DROP = (int(code) for code in Code)
STATE, TAPE, GRAD = (int(kind) for kind in Kind)
DEVICE, TIERS = int(Tier.DEVICE), len(Tier)

# One operation is one 64-bit integer: code, kind, source, target a byte each, then the stage. A
# run with tape has the option in place of the kind.
_KIND, _SOURCE, _TARGET, _STAGE = 8, 16, 24, 32


def _pack(operation: Operation) -> int:
    match operation:
        case Forward(stage, False):
            return Code.FORWARD | stage << _STAGE
        case Forward(stage, _, option):
            return Code.TAPED_FORWARD | option << _KIND | stage << _STAGE
        case Turn():
            return int(Code.TURN)
        case Backward(stage):
            return Code.BACKWARD | stage << _STAGE
        case Copy(value, source, target):
            tiers = source << _SOURCE | target << _TARGET
            return Code.COPY | value.kind << _KIND | tiers | value.stage << _STAGE
        case Drop(value, tier):
            return Code.DROP | value.kind << _KIND | tier << _SOURCE | value.stage << _STAGE
        case _:
            assert_never(operation)


def _unpack(packed: int) -> Operation:
    code, stage = packed & 0xFF, packed >> _STAGE
    match code:
        case Code.FORWARD:
            return Forward(stage)
        case Code.TAPED_FORWARD:
            return Forward(stage, tape=True, option=packed >> _KIND & 0xFF)
        case Code.TURN:
            return Turn()
        case Code.BACKWARD:
            return Backward(stage)
    value = Value(Kind(packed >> _KIND & 0xFF), stage)
    source = Tier(packed >> _SOURCE & 0xFF)
    if code == Code.COPY:
        return Copy(value, source, Tier(packed >> _TARGET & 0xFF))
    return Drop(value, source)


@final
class Schedule:
    """A sequence of operations, packed; iterating unpacks one at a time."""

    __slots__ = ("_packed",)

    def __init__(self, packed: npt.NDArray[np.int64]) -> None:
        """Take packed operations; `Schedule.of` takes readable ones.

        Args:
            packed: One 64-bit integer an operation, shape (m,).
        """
        self._packed = np.array(packed, dtype=np.int64)
        self._packed.flags.writeable = False

    @classmethod
    def of(cls, operations: Iterable[Operation]) -> Schedule:
        """Build a schedule from operations."""
        return cls(np.fromiter((_pack(op) for op in operations), dtype=np.int64))

    def __len__(self) -> int:
        """The number of operations."""
        return len(self._packed)

    def __iter__(self) -> Iterator[Operation]:
        """The operations in order."""
        for packed in self._packed:
            yield _unpack(int(packed))

    @overload
    def __getitem__(self, position: int) -> Operation: ...
    @overload
    def __getitem__(self, position: slice) -> Schedule: ...
    def __getitem__(self, position: int | slice) -> Operation | Schedule:
        """One operation, or a part as a schedule."""
        if isinstance(position, slice):
            return Schedule(self._packed[position])
        return _unpack(int(self._packed[position]))

    def __eq__(self, other: object) -> bool:
        """Whether both have the same operations in the same order."""
        return isinstance(other, Schedule) and np.array_equal(self._packed, other._packed)

    def __hash__(self) -> int:
        """Equal schedules have equal hashes."""
        return hash(self._packed.tobytes())

    def __repr__(self) -> str:
        """Length and the first operations."""
        head = " ".join(format_operation(op) for op in self[:8])
        return f"<Schedule of {len(self)} operations: {head}{' …' if len(self) > 8 else ''}>"

    @property
    def nbytes(self) -> int:
        """Bytes that the packed operations take."""
        return int(self._packed.nbytes)

    @property
    def packed(self) -> npt.NDArray[np.int64]:
        """The packed operations, which cannot be written to, shape (m,)."""
        return self._packed

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """The `Code` of every operation, shape (m,)."""
        return (self._packed & 0xFF).astype(np.uint8)

    @property
    def stages(self) -> npt.NDArray[np.int32]:
        """The stage of every operation, 0 for Turn, shape (m,)."""
        return (self._packed >> _STAGE).astype(np.int32)

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """The value's `Kind` of every Copy and Drop, the option of every run with tape."""
        return (self._packed >> _KIND & 0xFF).astype(np.uint8)

    @property
    def sources(self) -> npt.NDArray[np.uint8]:
        """The tier that a Copy reads or a Drop frees, shape (m,)."""
        return (self._packed >> _SOURCE & 0xFF).astype(np.uint8)

    def to_text(self) -> str:
        """The schedule as words, one an operation, that `from_text` reads back."""
        return " ".join(format_operation(op) for op in self)

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Read what `to_text` wrote.

        Raises:
            InvalidScheduleError: A word that is no operation.
        """
        return cls.of(parse_operation(word, i) for i, word in enumerate(text.split()))


_MOST_STAGE = 2**31 - 1  # a stage takes the upper half of a packed operation

_MOST_OPTION = 255  # and an option a byte
_MOST_DIGITS = 20  # leading zeros included
_LETTER = {Kind.STATE: "x", Kind.TAPE: "t", Kind.GRAD: "g"}
_KINDS = {letter: kind for kind, letter in _LETTER.items()}
_WORD = re.compile(
    r"(?P<op>[FB])(?P<stage>\d+)"
    r"|T(?P<taped>\d+)(?:\.(?P<option>\d+))?"
    r"|(?P<turn>turn)"
    r"|-(?P<dropped>[xtg])(?P<from>\d+)(?:@(?P<tier>host|disk))?"
    r"|(?P<copied>[xtg])(?P<of>\d+):(?P<source>\w+)>(?P<target>\w+)"
)


def format_operation(operation: Operation) -> str:
    """One word: F3, T3 (with tape), T3.1, turn, B3, -x3, -x3@host, x3:device>host."""
    match operation:
        case Forward(stage, False):
            return f"F{stage}"
        case Forward(stage, _, option):
            return f"T{stage}.{option}" if option else f"T{stage}"
        case Turn():
            return "turn"
        case Backward(stage):
            return f"B{stage}"
        case Copy(value, source, target):
            name = f"{_LETTER[value.kind]}{value.stage}"
            return f"{name}:{source.name.lower()}>{target.name.lower()}"
        case Drop(value, tier):
            place = "" if tier is Tier.DEVICE else f"@{tier.name.lower()}"
            return f"-{_LETTER[value.kind]}{value.stage}{place}"
        case _:
            assert_never(operation)


def parse_operation(word: str, position: int = 0) -> Operation:
    """Read one word of `format_operation`.

    Raises:
        InvalidScheduleError: The word at this position is no operation.
    """
    match = _WORD.fullmatch(word)
    try:
        if match is None:
            raise KeyError(word)
        stage = match["stage"] or match["taped"] or match["from"] or match["of"] or "0"
        if len(stage) > _MOST_DIGITS or int(stage) > _MOST_STAGE:
            reason = f"stages are counted to {_MOST_STAGE} at most"
            raise InvalidScheduleError(position, repr(word[:40]), reason)
        if match["turn"]:
            return Turn()
        if match["op"]:
            return (Backward if match["op"] == "B" else Forward)(int(match["stage"]))
        if match["taped"]:
            option = match["option"] or "0"
            if len(option) > _MOST_DIGITS or int(option) > _MOST_OPTION:
                reason = f"options are counted to {_MOST_OPTION} at most"
                raise InvalidScheduleError(position, repr(word[:40]), reason)
            return Forward(int(match["taped"]), tape=True, option=int(option))
        if match["dropped"]:
            tier = Tier[match["tier"].upper()] if match["tier"] else Tier.DEVICE
            return Drop(Value(_KINDS[match["dropped"]], int(match["from"])), tier)
        value = Value(_KINDS[match["copied"]], int(match["of"]))
        return Copy(value, Tier[match["source"].upper()], Tier[match["target"].upper()])
    except KeyError:
        raise InvalidScheduleError(position, repr(word), "this is no operation") from None


@final
class ScheduleBuilder:
    """Collects operations packed, as solvers emit them."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._packed = array("q")

    def forward(self, stage: int) -> None:
        """Run a stage without tape."""
        self._packed.append(stage << _STAGE)

    def tape(self, stage: int, option: int = 0) -> None:
        """Run a stage with one of its tapes."""
        self._packed.append(TAPED | option << _KIND | stage << _STAGE)

    def turn(self) -> None:
        """End the forward pass."""
        self._packed.append(TURN)

    def backward(self, stage: int) -> None:
        """Run a stage's backward."""
        self._packed.append(BACKWARD | stage << _STAGE)

    def drop_state(self, stage: int) -> None:
        """Forget a state on the device."""
        self._packed.append(DROP | stage << _STAGE)

    def packed(self, operation: int) -> None:
        """Any operation, as `Schedule.packed` has it."""
        self._packed.append(operation)

    def sweep(self, first: int, last: int, *, keep_last: bool = True) -> None:
        """Run stages first..last without tape, keeping only the state of the last.

        Args:
            first: First stage; its input must be available, and stays.
            last: Last stage; nothing is run where it is before the first.
            keep_last: Whether the last state stays.
        """
        for stage in range(first, last + 1):
            self.forward(stage)
            if stage > first:
                self.drop_state(stage - 1)
        if not keep_last and last >= first:
            self.drop_state(last)

    def build(self) -> Schedule:
        """The schedule so far."""
        return Schedule(np.frombuffer(self._packed, dtype=np.int64))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as JSON data."""
    return {"operations": schedule.to_text()}


def schedule_from_json(data: Any) -> Schedule:
    """Read `schedule_to_json`'s data.

    Raises:
        InvalidScheduleError: No text of operations, or a word that is none.
    """
    if not isinstance(data, dict) or not isinstance(data.get("operations"), str):
        raise InvalidScheduleError(0, "", "no text of operations was found")
    return Schedule.from_text(data["operations"])
