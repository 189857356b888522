"""Bytes of an adaptive step, and the number of tapes and states that a budget has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ...base.budget import exact_bytes
from ...base.errors import InfeasibleBudgetError

_LOSS_BYTES = 64  # a number, its gradient, and intermediate values


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of tensors of an adaptive solve, apart from the tapes and states that it keeps."""

    state_bytes: int
    """Bytes of one checkpoint: the state, and its snapshot of buffers."""
    snapshot_bytes: int = 0
    """Bytes of the snapshot alone."""
    forward_bytes: int
    """Peak of an attempt beyond the state at its start: slopes, error, a state inside."""
    backward_bytes: int
    """Peak of running a step again, with its tape and backward, beyond its input, the gradient
    that comes in and the sums of gradients."""
    gradient_bytes: int
    """Bytes of the gradients of the parameters."""
    start_bytes: int = 0
    """Bytes of the first slope and its tape, with which a solve with tapes begins."""
    tape_bytes: int | None = None
    """Bytes of each step that keeps its tape: the tape, the state at its end, its snapshot. None
    where no budget had room to measure it; the other figures of steps with tapes are then 0."""
    attempt_bytes: int = 0
    """Peak of an attempt with its tape beyond the tensors that live before it."""
    return_bytes: int = 0
    """Peak of going back through steps with tapes beyond these: gradients, those of the parameters
    included."""
    beside_bytes: int = 0
    """Bytes of other tensors that live throughout: the gradient of times, and the caller's."""
    output_bytes: int
    """Bytes of the state at one requested time."""
    outputs: int
    """Requested times; their states are the caller's in the backward, as are the gradients."""
    loss_bytes: int = 0
    """Peak of the caller's loss and the way back through it beyond the states at the requested
    times, up to where their gradients are there: these included."""

    @property
    def least_bytes(self) -> int:
        """Least budget: no state is kept but the initial one, which is the caller's."""
        return max(self._forward_bytes, self._backward_bytes)

    @property
    def probe_bytes(self) -> int:
        """A budget for which tapes are measured, and kept: two steps with tapes fit, and more."""
        return self.least_bytes + self.backward_bytes + self.forward_bytes

    @property
    def _forward_bytes(self) -> int:
        # The first snapshot is not the caller's, as the first state is.
        states = (self.outputs + 1) * self.output_bytes + self.snapshot_bytes
        return states + self.forward_bytes + self.beside_bytes

    @property
    def _backward_bytes(self) -> int:
        # With the first state, with the last step's, and with the one that runs on.
        states = (2 * self.outputs + 2) * self.output_bytes + 3 * self.snapshot_bytes
        backward = states + self.gradient_bytes + self.backward_bytes
        # The input of the last step is kept from the forward pass on.
        loss = self._outputs_and_loss_bytes + self.state_bytes + self.snapshot_bytes
        return max(backward, loss) + _LOSS_BYTES + self.beside_bytes

    @property
    def _outputs_and_loss_bytes(self) -> int:
        return self.outputs * self.output_bytes + self.loss_bytes

    def room(self, budget_bytes: int) -> Room:
        """The tapes and states that may be kept within a budget.

        Raises:
            InfeasibleBudgetError: Not even the initial state.
        """
        spare = budget_bytes - self.least_bytes
        if spare < 0:
            raise InfeasibleBudgetError(
                f"a budget of {exact_bytes(budget_bytes, budget=True)} is below one adaptive step "
                f"and its backward; the least that works is {exact_bytes(self.least_bytes)}, of "
                f"which {exact_bytes(2 * self.outputs * self.output_bytes)} are the states at the "
                f"{self.outputs} requested times with their gradients, "
                f"{exact_bytes(self.gradient_bytes)} the gradients of parameters and "
                f"{exact_bytes(self.backward_bytes)} the tape of a step",
                budget_bytes=budget_bytes,
                least_budget_bytes=self.least_bytes,
                stage="a step",
            )
        slots = 1 + spare // max(self.state_bytes, 1)
        if self.tape_bytes is None or budget_bytes < self.probe_bytes:
            return Room(slots=slots)
        # An attempt comes on top of the tapes before it, the way back on top of its tape, too.
        states = self.outputs * self.output_bytes
        back = max(2 * states + self.return_bytes, self._outputs_and_loss_bytes) + _LOSS_BYTES
        last = max(states + self.attempt_bytes, self.tape_bytes + back)
        return Room(
            slots=slots,
            spare_bytes=spare,
            tape_spare_bytes=budget_bytes - last - self.output_bytes - self.beside_bytes,
            state_bytes=max(self.state_bytes, 1),
            start_bytes=self.start_bytes,
            tape_bytes=self.tape_bytes,
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The room of an adaptive solve for tapes of its first steps, and for states after them.

    A tape takes more than a state and saves the same run of a step. So tapes have the room that no
    state needs yet, and are dropped, the latest first, as states come.
    """

    slots: int
    """States that may be kept at once, the initial one included, where no tape is."""
    spare_bytes: int = 0
    """Bytes for tapes and states."""
    tape_spare_bytes: int = -1
    """Bytes for tapes before a step that keeps its own."""
    state_bytes: int = 1
    start_bytes: int = 0
    tape_bytes: int = 0

    def another(self, tapes: int) -> bool:
        """Whether one more step may keep its tape, after so many that have."""
        return self.start_bytes + tapes * self.tape_bytes <= self.tape_spare_bytes

    def states(self, tapes: int) -> int:
        """Number of states that may be kept beside the tapes of so many first steps.

        The state at the end of the last of these counts as kept, as the initial one does. With too
        many tapes the number is not positive.
        """
        if not tapes:
            return self.slots
        spare = self.spare_bytes - self.start_bytes - tapes * self.tape_bytes
        return 1 + spare // self.state_bytes
