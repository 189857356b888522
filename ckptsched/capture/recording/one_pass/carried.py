"""What a model carries from call to call, as the state of a recurrent network, becomes an argument.

A forward that reads a tensor from an attribute, and puts another there for the next call, cannot
be run again in the backward: another lies there by then. So the tensor that lies there when the
model is called is given to the calls as those of the arguments are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from itertools import chain

from torch import nn

from ....tensors.pytree import State
from ..calls import Numbered, Place, RecordedCall, Source
from ..recording import Recording, layouts_of, part_of


def with_carried(recording: Recording, model: nn.Module) -> Recording:
    """The recording, given what it reads and replaces; itself where there is nothing.

    Args:
        recording: As it was noted.
        model: The model that it is of, as it was before the pass.
    """
    read = chain.from_iterable(call.places for call in _reading(recording))
    ends = chain(recording.returned, *(sources for _, sources in recording.kept.values()))
    places = (source for source in (*read, *ends) if isinstance(source, Place))
    found = dict.fromkeys(place for place in places if _is_replaced(place, recording.kept))
    if not found:
        return recording
    numbers = chain(recording.given, *(call.makes for call in recording.calls))
    first = max(numbers, default=-1) + 1
    number = {place: first + k for k, place in enumerate(found)}

    def given(sources: Iterable[Source]) -> tuple[Source, ...]:
        return tuple(
            [
                Numbered(number[source])
                if isinstance(source, Place) and source in number
                else source
                for source in sources
            ]
        )

    def renamed(call: RecordedCall) -> RecordedCall:
        return replace(call, reads=given(call.reads)) if number.keys() & call.places else call

    held = [place.look_up(part_of(model, place.path)) for place in found]
    return replace(
        recording,
        calls=tuple([renamed(call) for call in recording.calls]),
        guards=tuple([replace(g, read=renamed(g.read)) for g in recording.guards]),
        given=(*recording.given, *number.values()),
        returned=given(recording.returned),
        kept={place: (state, given(s)) for place, (state, s) in recording.kept.items()},
        carried=tuple(found),
        carried_layouts=layouts_of(State(tuple(held))),
    )


def _is_replaced(place: Place, kept: Container[Place]) -> bool:
    """Whether something else is put where a tensor lies, or in the place of what holds it."""
    return any(replace(place, steps=place.steps[:k]) in kept for k in range(len(place.steps) + 1))


def _reading(recording: Recording) -> list[RecordedCall]:
    return [*recording.calls, *(guard.read for guard in recording.guards)]
