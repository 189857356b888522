"""Where the tensors that calls are given come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ....tensors.pytree import State
from ....torch_state.torch_modes import transform_at_work
from ..calls import Fixed, Numbered, Place, Source, tensors_inside
from .marks import Marks
from .owned import places_of
from .values import Numbers


@final
class Sources:
    """Tells of a tensor where it comes from, and marks where it cannot be told."""

    def __init__(self, model: nn.Module, marks: Marks) -> None:
        """Look at what the model owns.

        Args:
            model: The model.
            marks: Where it is marked that a tensor comes from nowhere.
        """
        self.places = places_of(model)
        """Where the model keeps its tensors, by identity."""
        self.numbers = Numbers()
        """Of the tensors that it was given or has made."""
        self.refusal = ""
        """Which tensor no call can be given; empty for none."""
        self._marks = marks
        self._hidden: dict[int, str] = {}  # tensors in arguments, by identity: in what
        # Storages that came into being meanwhile, by identity, each with its scope then. What is
        # held weakly keeps its identity: no later storage is taken for it.
        self._born: dict[int, tuple[StorageWeakRef | None, str]] = {}

    def begin(self, inputs: State) -> tuple[int, ...]:
        """The numbers of the tensors of the arguments.

        Args:
            inputs: What the model is called with, as `(args, kwargs)`.
        """
        self._hidden = {
            id(tensor): type(argument).__name__
            for argument in inputs.constants()
            for _, tensor in tensors_inside(argument)
        }
        return tuple([self.numbers.add(leaf) for leaf in inputs.leaves])

    def note_born(self, tensors: Iterable[Tensor]) -> None:
        """Note what an operator has given.

        Args:
            tensors: Its results.
        """
        for tensor in tensors:
            home = _home(tensor)
            if home not in self._born:
                held = _weakly(tensor) if home else None
                self._born[home] = held, self._marks.scopes[-1]

    def place(self, thing: Any) -> Place | None:
        """Where the model keeps a tensor; None if it does not, or for anything else."""
        return self.places.get(id(thing))

    def of(self, tensor: Tensor) -> Source:
        """Where a tensor comes from.

        Args:
            tensor: One that a call is given, or that the model gives.
        """
        place, number = self.place(tensor), self.numbers.of(tensor)
        if place is not None:
            return place
        if number is not None:
            return Numbered(number)
        born = self._born.get(_home(tensor))
        if id(tensor) in self._hidden:
            self.refusal = (
                f"it is given a {self._hidden[id(tensor)]}, in which tensors are not seen; call it "
                "with tensors, or with tuples, lists, dicts and dataclasses of them"
            )
        elif transform_at_work([tensor]):
            self._marks.mark("a transform of torch.func is at work")
        elif born is not None:
            why = "an object hides a tensor that the model has made"
            self._marks.mark_around(why, born[1], self._marks.scopes[-1])
        elif tensor.requires_grad:
            self._marks.mark("a trained tensor is used that is no parameter of the model")
        return Fixed(tensor)


def _home(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of a kind without storage
        return 0


def _weakly(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
