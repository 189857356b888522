"""Seconds of stages and of the loss, measured in rounds over all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from .context import now
from .survey import Kind, layout

# Rounds of timing: three tell a disturbed one; more where they are cheap.
_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 15, 2.0

ROUNDS = _MIN_ROUNDS
"""Rounds that are taken in any case; each tells when a stage is done."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@final
@dataclass(eq=False, slots=True)
class _Samples:
    """What the clock has shown of all stages of one look, in seconds."""

    plain: list[float] = field(default_factory=list)
    """Runs without tape."""
    taped: list[float] = field(default_factory=list)
    """Runs with tape."""
    back: list[float] = field(default_factory=list)
    """Backwards."""
    uses: int = 0
    """How many stages of the chain have this look."""

    def take(self, kind: Kind) -> None:
        """Time a stage forward without tape, forward with tape, and backward."""
        device = kind.x.leaves[0].device
        if self.uses > 1:
            # Equal steps run one after the other, and find caches and memory as the last left them.
            kind.run()
        start = now(device)
        kind.run()
        plain = now(device)
        tape, _ = kind.record(kind.x)
        taped = now(device)
        kind.go_back(tape)
        end = now(device)
        self.plain.append(plain - start)
        self.taped.append(taped - plain)
        self.back.append(end - taped)

    def tell(self, kind: Kind) -> None:
        """Give a stage its seconds."""
        kind.forward_seconds = _typical(self.plain)
        # Every schedule runs each stage with tape once, so what that takes longer is a constant.
        # Where nothing comes back there is nothing to run, and what the clock shows is noise.
        longer = max(0.0, _typical(self.taped) - kind.forward_seconds)
        kind.backward_seconds = _typical(self.back) + longer if any(kind.carries) else 0.0


def _typical(seconds: Sequence[float]) -> float:
    """The lower quartile: what else the machine does only ever makes a run longer."""
    return sorted(seconds)[len(seconds) // 4]


def time_stages(
    kinds: Sequence[Kind],
    loss: Callable[[], object],
    device: torch.device,
    done: Callable[[], None],
) -> float:
    """Give every kind of stage its seconds.

    All are run in turn, round after round, so that what disturbs one round disturbs all alike.
    Stages that look alike, such as equal layers with weights of their own, share what is measured
    of any of them: they differ in nothing but noise.

    Args:
        kinds: The distinct stages, weighed; each is given its seconds.
        loss: Runs the loss and goes back through it.
        device: Where they run.
        done: Called after each stage in the rounds that are taken in any case.

    Returns:
        Seconds of the loss.
    """
    looks = [_look(kind) for kind in kinds]
    samples = {look: _Samples() for look in looks}
    for kind, look in zip(kinds, looks, strict=True):
        samples[look].uses += kind.count
    of_loss = []
    begun = now(device)
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and now(device) - begun > _ENOUGH_SECONDS:
            break
        for kind, look in zip(kinds, looks, strict=True):
            samples[look].take(kind)
            if turn < _MIN_ROUNDS:
                done()
        start = now(device)
        loss()
        of_loss.append(now(device) - start)
    for kind, look in zip(kinds, looks, strict=True):
        samples[look].tell(kind)
    return _typical(of_loss)


def _look(kind: Kind) -> Hashable:
    """Equal for stages that compute the same with other values; unequal wherever in doubt."""
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
        kind.needs_tape,
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


def _comparable(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple([_comparable(item) for item in value])
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value  # type: ignore[no-any-return]
