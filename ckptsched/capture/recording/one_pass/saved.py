"""What graphs save while a model is recorded, so that a pass takes no more than a forward."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import final

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .marks import Marks


class GoesBackError(BaseException):
    """The model differentiates inside; no `Exception`, as models may catch those."""


@final
class SavedTensors:
    """Has graphs save nothing, or until the pass is over."""

    def __init__(self, marks: Marks) -> None:
        """Nothing is saved yet.

        Args:
            marks: Where it is marked that somebody goes back through a graph.
        """
        self._marks = marks
        # Graphs hold the boxes, and no tensors.
        self._boxes: list[list[Tensor]] = []

    def forgotten(self) -> AbstractContextManager[None]:
        """A context in which nothing is saved."""
        return saved_tensors_hooks(_forget, self._recall)

    def kept(self) -> AbstractContextManager[None]:
        """A context for what is not opened, which may go back through a graph of its own."""
        return saved_tensors_hooks(self._keep, _take)

    def clear(self) -> None:
        """Let go of what was kept."""
        for box in self._boxes:
            box.clear()

    def _keep(self, tensor: Tensor) -> list[Tensor]:
        box = [tensor]
        self._boxes.append(box)
        return box

    def _recall(self, nothing: None) -> Tensor:
        """Somebody goes back through a graph whose tensors were not saved."""
        self._marks.mark("it goes back through a graph inside the model")
        raise GoesBackError


def _take(box: list[Tensor]) -> Tensor:
    if not box:
        raise GoesBackError
    return box[0]


def _forget(tensor: Tensor) -> None:
    """Saves nothing."""
