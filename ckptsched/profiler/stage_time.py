"""Seconds of stages and of the loss, measured in rounds over all of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from ..base.errors import TimingWarning
from ..torch_state.replay_context import now
from .stage_kind import StageKind, layout

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

# Rounds of timing: three tell a disturbed one, more where they are cheap; then on until two halves
# of them agree, well at first and roughly once it took long, within limits of rounds and seconds.
_MIN_ROUNDS, _FEW_ROUNDS, _CHEAP_SECONDS = 3, 15, 2.0
_MAX_ROUNDS, _MOST_SECONDS = 60, 8.0
_AGREED, _AGREED_LATE = 0.03, 0.06  # the disagreement, relative, with which they are good enough
MOST_SPREAD = 0.10  # the one from which on people are warned
# Most bytes of a freed block from which glibc learns what to keep: 32 MiB and its own header.
_KEPT_BYTES = 2**25 - 2**16
# A run in which the thread waited for longer than this was disturbed, or waits by itself.
_WAITED_SHARE, _WAITED_SECONDS = 0.05, 20e-6
thread_seconds = time.thread_time
_OF_THREAD = getattr(resource, "RUSAGE_THREAD", None)  # Linux has it
_FEWEST = 3  # undisturbed runs that are taken by themselves

ROUNDS = _MIN_ROUNDS
"""Rounds that are taken in any case; each tells when a stage is done."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def waits() -> int | None:
    """How often the calling thread has given up its processor to wait; None if nobody tells."""
    return None if _OF_THREAD is None else resource.getrusage(_OF_THREAD).ru_nvcsw


@final
@dataclass(frozen=True, slots=True)
class _Run:
    """One timed run."""

    seconds: float
    """On the clock on the wall, without what others had the processor for where that is known."""
    disturbed: bool
    """Whether the thread had no processor for a part of it."""


@final
@dataclass(slots=True)
class _StopWatch:
    """Times runs that follow each other."""

    device: torch.device
    _wall: float = 0.0
    _busy: float = 0.0
    _waits: int | None = None

    def start(self) -> None:
        """Start the clock."""
        self._wall, self._busy, self._waits = now(self.device), thread_seconds(), waits()

    def lap(self) -> _Run:
        """The run since `start` or the last lap."""
        before, self._waits = self._waits, waits()
        wall, busy = now(self.device), thread_seconds()
        seconds, worked = wall - self._wall, busy - self._busy
        self._wall, self._busy = wall, busy
        waited = seconds - worked > max(_WAITED_SHARE * seconds, _WAITED_SECONDS)
        # On a GPU the thread waits in any case.
        if not waited or self.device.type != "cpu":
            return _Run(seconds, disturbed=False)
        # A thread that waited for nothing was pushed off its processor: what it worked is the
        # run's. Else long stages, which seldom get through undisturbed on a busy machine, would
        # seem dearer beside short ones than they are. A clock that stands still tells nothing.
        pushed_off = before is not None and before == self._waits and worked > 0
        return _Run(worked if pushed_off else seconds, disturbed=True)


@final
@dataclass(eq=False, slots=True)
class _Samples:
    """Seconds measured of all stages that look alike."""

    plain: list[_Run] = field(default_factory=list)
    """Runs without tape."""
    taped: list[_Run] = field(default_factory=list)
    """Runs with tape."""
    back: list[_Run] = field(default_factory=list)
    """Backwards."""
    lean_taped: list[_Run] = field(default_factory=list)
    """Runs with a lean tape, where there is one."""
    lean_back: list[_Run] = field(default_factory=list)
    """Backwards from it."""
    kinds: list[StageKind] = field(default_factory=list)
    """The stages."""

    @property
    def uses(self) -> int:
        """How many stages of the chain look so."""
        return sum(kind.count for kind in self.kinds)

    def take(self, turn: int) -> None:
        """Time one of them forward without tape, forward with tape, and backward.

        Args:
            turn: Number of the round: each time it is another one.
        """
        kind = self.kinds[turn % len(self.kinds)]
        watch = _StopWatch(kind.x.leaves[0].device)
        if self.uses > 1:
            # Equal steps run one after the other, and find caches and memory as the last left them.
            kind.begin()
            kind.run()
        kind.begin()
        watch.start()
        kind.run()
        self.plain.append(watch.lap())
        kind.begin()
        watch.start()
        tape, _ = kind.record(kind.x)
        self.taped.append(watch.lap())
        kind.go_back(tape)
        self.back.append(watch.lap())
        leanly = kind.leanly() if kind.lean is not None else None
        if leanly is not None:
            kind.begin()
            watch.start()
            tape, _ = leanly.record(kind.x)
            self.lean_taped.append(watch.lap())
            leanly.go_back(tape)
            self.lean_back.append(watch.lap())

    def seconds(self, part: slice = slice(None)) -> tuple[float, float]:
        """Seconds of the forward and the backward, by some of the rounds.

        Args:
            part: Which rounds.
        """
        forward = _typical(self.plain[part])
        # Every schedule runs each stage with tape once, so what that takes longer is a constant.
        longer = max(0.0, _typical(self.taped[part]) - forward)
        return forward, _typical(self.back[part]) + longer

    def disagreement(self) -> float:
        """Seconds by which every other round differs from the rest, for all uses."""
        one, other = self.seconds(slice(0, None, 2)), self.seconds(slice(1, None, 2))
        return self.uses * sum(abs(a - b) for a, b in zip(one, other, strict=True))

    def tell(self) -> None:
        """Give the stages their seconds."""
        forward, backward = self.seconds()
        for kind in self.kinds:
            kind.forward_seconds = forward
            # Where nothing comes back there is nothing to run, and what the clock shows is noise.
            kind.backward_seconds = backward if any(kind.carries) else 0.0
            if self.lean_back:
                longer = max(0.0, _typical(self.lean_taped) - forward)
                kind.lean_backward_seconds = _typical(self.lean_back) + longer


def _typical(runs: Sequence[_Run]) -> float:
    """The lower quartile: what else the machine does only ever makes a run longer.

    Of undisturbed runs, where there are some; a stage that waits by itself has none.
    """
    calm = [run.seconds for run in runs if not run.disturbed]
    seconds = sorted(calm if len(calm) >= _FEWEST else [run.seconds for run in runs])
    return seconds[len(seconds) // 4]


def _keep_freed_pages(device: torch.device) -> None:
    """Let the allocator of a Linux process keep pages that are freed, as a long run lets it.

    glibc gives blocks back to the kernel above a size that grows with the largest block that was
    freed so far, and whoever takes them anew pays for empty pages: a stage by itself over and over,
    and a step, whose memory lies between other memory, seldom. A block that is never touched
    teaches it the size.

    Source: mallopt(3), on M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if device.type == "cpu":
        torch.empty(_KEPT_BYTES, dtype=torch.uint8, device=device)


def _is_enough(rounds: int, seconds: float, samples: Sequence[_Samples]) -> bool:
    """Whether so many rounds in so many seconds will do.

    Args:
        rounds: Rounds over all stages.
        seconds: What they took.
        samples: What they have shown.
    """
    if rounds < _MIN_ROUNDS or (rounds < _FEW_ROUNDS and seconds <= _CHEAP_SECONDS):
        return False
    if seconds > _MOST_SECONDS:
        return True
    return _spread(samples) <= (_AGREED if seconds <= _CHEAP_SECONDS else _AGREED_LATE)


def _spread(samples: Sequence[_Samples]) -> float:
    """How far two halves of the rounds are apart, relative to all seconds."""
    total = sum(each.uses * sum(each.seconds()) for each in samples)
    return sum(each.disagreement() for each in samples) / total if total else 0.0


def time_stages(
    kinds: Sequence[StageKind],
    loss: Callable[[], object],
    device: torch.device,
    done: Callable[[], None],
) -> tuple[float, float]:
    """Give every kind of stage its seconds.

    All are run in turn, round after round, so that what disturbs one round disturbs all alike,
    until two halves of the rounds agree. Stages that look alike, such as equal layers with weights
    of their own, share what is measured of any of them: they differ in nothing but noise.

    Args:
        kinds: The distinct stages, weighed; each is given its seconds.
        loss: Runs the loss and goes back through it.
        device: Where they run.
        done: Called after each stage in the rounds that are taken in any case.

    Returns:
        Seconds of the loss, and by how much two halves of the rounds still differ, as a share of
        all seconds. Where that is much, people are warned.
    """
    _keep_freed_pages(device)
    samples: dict[Hashable, _Samples] = {}
    for kind in kinds:
        samples.setdefault(_likeness(kind), _Samples()).kinds.append(kind)
    found = list(samples.values())
    of_loss: list[_Run] = []
    watch, begun = _StopWatch(device), now(device)
    for turn in range(_MAX_ROUNDS):
        if _is_enough(turn, now(device) - begun, found):
            break
        for each in found:
            each.take(turn)
            for _ in each.kinds if turn < _MIN_ROUNDS else ():
                done()
        watch.start()
        loss()
        of_loss.append(watch.lap())
    for each in found:
        each.tell()
    spread = _spread(found)
    if spread > MOST_SPREAD:
        warnings.warn(
            f"the seconds of stages differ by {spread:.0%} between halves of {len(of_loss)} "
            "rounds: something else keeps the machine busy. Bytes are exact; the overhead of "
            "plans, and which of them is fastest, are to be trusted that far. Profile on a quiet "
            "machine",
            TimingWarning,
            stacklevel=3,
        )
    return _typical(of_loss), spread


def _likeness(kind: StageKind) -> Hashable:
    """Equal for stages that compute the same with other values; unequal wherever in doubt."""
    if kind.look is not None:
        gradients = tuple([None if g is None else layout([g]) for g in kind.gradients])
        return kind.look, gradients, kind.ledger
    parts = list(kind.call.module.modules())
    places = {id(part): k for k, part in enumerate(parts)}
    owned = (*kind.call.module.named_parameters(), *kind.call.module.named_buffers())
    return (
        type(kind.call),
        _without_identities(kind.call.key, places),
        tuple([(type(part), part.training, _attributes(part)) for part in parts]),
        tuple([(name, layout([tensor]), tensor.requires_grad) for name, tensor in owned]),
        (layout(kind.x.leaves), kind.x.describe(lambda _: "tensor"), kind.wanted, kind.carries),
        tuple([None if g is None else layout([g]) for g in kind.gradients]),
        (kind.alone, kind.own_leaves),
        kind.ledger,
    )


def _without_identities(key: Hashable, places: Mapping[int, int]) -> Hashable:
    """The key of a call with each module as its place among the stage's own."""
    if isinstance(key, tuple):
        return tuple([_without_identities(part, places) for part in key])
    return ("module", places[key]) if isinstance(key, int) and key in places else key


def _attributes(module: nn.Module) -> Hashable:
    """What a module has besides what every module has: numbers and functions may tell its cost."""
    mine = (item for item in vars(module).items() if item[0] not in _OF_EVERY_MODULE)
    return tuple([(name, _comparable(value)) for name, value in mine])


def _comparable(value: Any, around: tuple[int, ...] = ()) -> Hashable:
    if isinstance(value, (list, tuple)) and id(value) not in around:  # a list may hold itself
        return tuple([_comparable(item, (*around, id(value))) for item in value])
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value  # type: ignore[no-any-return]
