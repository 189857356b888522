"""Where a recording may be cut into stages, and where it is worth it.

Between two calls lie the tensors that calls before have made and calls after read: the live set.
A cut hands it on as the state. Every forward pass is a chain in this way: skip connections, masks
and tables ride along as parts of the state, and a storage counts once however many states hold it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...tensors.pytree import storages
from .functions import EFFECTS
from .recording import Bound, Recording

# Of cuts that lie so near to each other, as a part of the forward's seconds, the leanest is enough.
_NEAR = 1 / 400


@final
@dataclass(frozen=True)
class CallCosts:
    """What the calls of a recording take, in the order in which they run."""

    seconds: tuple[float, ...]
    """For each call."""
    live_bytes: tuple[int, ...]
    """Before each call, and after the last, the bytes of the storages of the live set."""
    legal: tuple[bool, ...]
    """Before each call whether a cut may lie there; the first is none."""


def measure(recording: Recording, model: nn.Module, tensors: Sequence[Tensor]) -> CallCosts:
    """Run a recording call by call; who calls this puts the model back.

    Args:
        recording: The recording.
        model: The model that it is of.
        tensors: The tensors of the arguments.
    """
    bound, last = Bound(recording, model), recording.last_read
    values = dict(zip(recording.given, tensors, strict=True))
    homes: dict[int, tuple[int, int]] = {}  # of each value the storage, and its bytes
    made: dict[int, int] = {}  # of each storage the call that has made it
    written: dict[int, int] = {}  # and the last call that has written to it
    _note(homes, made, values, values, -1)
    seconds = []
    with saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)):
        for k, call in enumerate(recording.calls):
            given = [bound.tensor(source, values) for source in call.reads]
            before = [tensor._version for tensor in given]
            start = time.perf_counter()
            bound.run(k, values)
            seconds.append(time.perf_counter() - start)
            _note(homes, made, values, [n for n in call.makes if n >= 0], k)
            for tensor, version in zip(given, before, strict=True):
                if tensor._version != version or call.target in EFFECTS:
                    written.update(dict.fromkeys(storages([tensor]), k))
            del given
            for number in {*call.values, *call.makes}:
                if last.get(number) == k:
                    values.pop(number, None)
    calls = len(recording.calls)
    legal = [False, *[True] * (calls - 1)]
    for home, end in written.items():
        for k in range(made.get(home, end) + 1, end + 1):
            legal[k] = False
    live = [sum(dict(_homes_at(recording, homes, k)).values()) for k in range(calls + 1)]
    return CallCosts(tuple(seconds), tuple(live), tuple(legal))


def _note(
    homes: dict[int, tuple[int, int]],
    made: dict[int, int],
    values: dict[int, Tensor],
    numbers: object,
    k: int,
) -> None:
    for number in numbers:  # type: ignore[attr-defined]
        for home, parts in storages([values[number]]).items():
            homes[number] = home, parts[0].untyped_storage().nbytes()
            made.setdefault(home, k)


def _homes_at(
    recording: Recording, homes: dict[int, tuple[int, int]], k: int
) -> list[tuple[int, int]]:
    return [homes[number] for number in recording.live(k) if number in homes]


def every_cut(measured: CallCosts) -> tuple[int, ...]:
    """All places where a cut may lie."""
    return tuple(k for k, legal in enumerate(measured.legal) if legal)


def lean_cuts(measured: CallCosts) -> tuple[int, ...]:
    """Those of all cuts beside which no leaner one lies within a small part of the seconds."""
    cuts, at = every_cut(measured), [0.0]
    for seconds in measured.seconds:
        at.append(at[-1] + seconds)
    near, live = at[-1] * _NEAR, measured.live_bytes
    chosen = []
    for k, cut in enumerate(cuts):
        beaten = False
        for step in (-1, 1):
            j = k + step
            while 0 <= j < len(cuts) and abs(at[cuts[j]] - at[cut]) <= near and not beaten:
                beaten = (live[cuts[j]], step) < (live[cut], 0)
                j += step
        if not beaten:
            chosen.append(cut)
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
