"""Records parameters, buffers, modes and random state in a forward pass, for recomputation.

Torch's own settings and modes are recorded, too. Stages that run again in the backward find all of
it restored; a change in between that would give wrong gradients is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from operator import is_
from typing import NoReturn, final

from torch import Tensor, nn

from ...base.errors import ExecutionError
from ...recompute.parameter_swap import make_alias
from ...recompute.stateful_buffers import Values
from ...tensors.pytree import NO_EXTRAS, Extras, State
from ...torch_state.locks import Stay
from ...torch_state.replay_context import (
    Autocast,
    Generators,
    OneWay,
    RandomState,
    Recomputing,
    contexts,
)
from ...torch_state.surroundings import Ambient
from ..prepared_plan import PreparedPlan
from .replay import Replay

_NOTHING = NO_EXTRAS.apart()


@final
class ForwardSnapshot:
    """The parameters, buffers, modes and random state of one forward pass, to check and restore."""

    def __init__(
        self,
        prepared: PreparedPlan,
        given: State,
        ambient: Ambient,
        inside: Ambient | None = None,
        within: Sequence[Stay] = (),
    ) -> None:
        """Record everything, and make an alias of each parameter.

        Args:
            prepared: The model and its plan.
            given: What every stage is given besides the state, taken apart.
            ambient: What the caller has around.
            inside: The same with the context of a first run; None where the user gives none.
            within: The turns during which the step was begun.
        """
        self._within = within
        self.prepared, self.device = prepared, ambient.device
        self._ambient = ambient
        # What stages are to find, and what is around; no backward is going on yet.
        self._wanted = self._around = inside or ambient
        self.parameters = prepared.inspection.slots.parameters()
        later = prepared.sharded_parameters()
        self.waiting = [k for k, p in enumerate(self.parameters) if id(p) in later] if later else []
        """Numbers of the parameters that FSDP is still to gather: no alias stands for them yet."""
        self._parameter_aliases = [p if id(p) in later else make_alias(p) for p in self.parameters]
        self.alias_of: dict[int, Tensor] = {}
        self.give(given)
        self.bound = [slots.bind(self.alias_of) for slots in prepared.slots]
        self._versions = [p._version for p in self.parameters]
        self._buffers = [slots.buffers_in_place() for slots in prepared.slots]
        self._buffer_versions = self._versions_of_buffers()
        self._generators_found = prepared.inspection.generators(
            given.constants(), foreign=prepared.signature.foreign
        )
        self._unchanged: list[bool] = []
        self._steady: dict[tuple[int, str], tuple[Tensor, int]] = {}  # that no stage may change
        self._modes = [[m.training for m in slots.modules] for slots in prepared.slots]
        # For one more backward; neither of the two is a tensor, whose bytes would count.
        own = self._generators_found
        self._generators = Generators(self.device, own) if prepared.chain.draws else None
        self._untouched = b"" if prepared.chain.draws else self._random_state().to_bytes()
        self._hidden_at_first = prepared.hidden.take(0) if prepared.hidden else ()
        self._replay: Replay | None = None

    def give(self, given: State) -> None:
        """Make aliases of the further arguments that every stage is given.

        Args:
            given: It, as the caller gave it, taken apart.
        """
        self.given, self._given_versions = given, given.versions()
        own = zip(self.parameters, self._parameter_aliases, strict=True)
        self.alias_of = {id(p): alias for p, alias in own}
        stand_ins = [
            self.alias_of.get(id(t), make_alias(t)) if t.requires_grad else t.detach()
            for t in given.leaves
        ]
        self.alias_of |= {id(t): a for t, a in zip(given.leaves, stand_ins, strict=True)}
        self.extras = Extras.of(given.replaced(stand_ins))
        # What collects gradients: for the parameters, and for what every stage is given.
        self.aliases = [*self._parameter_aliases, *stand_ins]

    def replace(self, k: int, parameter: Tensor) -> None:
        """Put the tensor that FSDP has gathered in the place of a parameter from here on.

        Args:
            k: Its number among the parameters.
            parameter: The other tensor.
        """
        alias = make_alias(parameter)
        self.parameters[k], self._versions[k] = parameter, parameter._version
        self._parameter_aliases[k] = self.aliases[k] = self.alias_of[id(parameter)] = alias

    def match_gradients(self, block: int) -> None:
        """Collect the gradients of a block's parameters in the dtype that FSDP wants them in.

        Args:
            block: Its index.
        """
        places = zip(self.prepared.slots[block].in_place(), self.bound[block], strict=True)
        for parameter, alias in places:
            wanted = getattr(parameter, "grad_dtype", None)  # torch 2.9 has none, and casts later
            if alias is not None and alias.is_leaf and getattr(alias, "grad_dtype", None) != wanted:
                alias.grad_dtype = wanted

    def _random_state(self) -> RandomState:
        return RandomState.take(self.device, self._generators_found)

    def snapshot(self, i: int) -> StateSnapshot:
        """Take a snapshot of random state and hidden buffers, to recompute from state i.

        Args:
            i: The stage, counted from 1; 0 before the first.
        """
        hidden: Values = ()
        if i == 0:
            hidden = self._hidden_at_first
        elif self.prepared.hidden and i + 1 < len(self.prepared.script.owner):
            hidden = self.prepared.hidden.take(int(self.prepared.script.owner[i + 1]))
        random = self._random_state() if self.prepared.chain.draws else None
        return StateSnapshot(self, random, hidden)

    def put_hidden(self, values: Values) -> None:
        """Put copied values into the clones of buffers."""
        assert self._replay is not None
        self.prepared.hidden.put(values)

    def let_go(self) -> None:
        """Let go of the further arguments."""
        if self.extras:
            self.give(_NOTHING)

    def _versions_of_buffers(self) -> list[int]:
        held = (b for buffers in self._buffers for b in buffers if b is not None)
        return [b._version for b in held]

    def end_forward(self) -> None:
        """Record which buffers the forward pass itself has changed.

        Raises:
            ExecutionError: It drew random numbers, which the plan does not put back.
        """
        drawing = self._generators is not None
        if not drawing and self._random_state().to_bytes() != self._untouched:
            raise ExecutionError(
                "a stage drew random numbers, and none did when the model was profiled: it would "
                "draw others when it runs again; profile and plan again, with a sample on which it "
                "draws; or another thread drew from torch's generator meanwhile: give that one a "
                "torch.Generator of its own"
            )
        if [p._version for p in self.parameters] != self._versions:
            self._refuse_changed(self.parameters, self._versions, "in the forward pass")
        now = self._versions_of_buffers()
        self._check_changes(now)
        self._unchanged = [a == b for a, b in zip(self._buffer_versions, now, strict=True)]
        # The kernels of normalisation move statistics at one version: what may change, may have.
        self._steady = {
            (id(module), name): (buffer, buffer._version)
            for slots, held, block in zip(
                self.prepared.slots, self._buffers, self.prepared.may_change, strict=True
            )
            for (module, name), buffer, may in zip(slots.buffer_places(), held, block, strict=True)
            if buffer is not None and not may
        }

    def versions_in(self, blocks: Iterable[int]) -> list[int]:
        """The version counters of the parameters of some blocks.

        Args:
            blocks: Indices of the blocks.
        """
        return [p._version for k in blocks for p in self.bound[k] if p is not None]

    def check_again(self, blocks: Sequence[int], before: list[int]) -> None:
        """Raise if stages that ran again have changed parameters in place.

        Args:
            blocks: Indices of their blocks.
            before: What `versions_in` gave before they ran.

        Raises:
            ExecutionError: They have.
        """
        if self.versions_in(blocks) != before:
            held = [p for k in blocks for p in self.bound[k] if p is not None]
            self._refuse_changed(held, before, "as it ran again")

    def check_places(self, blocks: Iterable[int]) -> None:
        """Raise if stages have put other tensors in the place of their parameters.

        Args:
            blocks: Indices of the blocks, whose stand-ins are still in place.

        Raises:
            ExecutionError: They have.
        """
        for k in blocks:
            slots, bound = self.prepared.slots[k], self.bound[k]
            now = slots.in_place()
            if not all(map(is_, now, bound)):
                place = slots.parameter_place(list(map(is_, now, bound)).index(False))
                self._refuse_change(self.prepared.owner_of_slot(place), "was replaced")

    def _refuse_changed(
        self, parameters: Sequence[Tensor], versions: Sequence[int], when: str
    ) -> NoReturn:
        pairs = zip(parameters, versions, strict=True)
        changed = next(p for p, version in pairs if p._version != version)
        self._refuse_change(self.prepared.owner_of(changed), f"was changed in place {when}")

    def _refuse_change(self, owner: str, what: str) -> NoReturn:
        raise ExecutionError(
            f"{owner} {what}: a stage changes it in its forward, and did not "
            "when the model was profiled, so it would be changed once more each time that the "
            "stage runs again; keep what a stage changes in a buffer (register_buffer), and "
            "profile and plan again"
        )

    def _check_changes(self, versions: Sequence[int]) -> None:
        """Refuse changes of buffers that the profile did not see."""
        flags = zip(self._buffers, self.prepared.may_change, strict=True)
        allowed = (
            may
            for held, block in flags
            for b, may in zip(held, block, strict=True)
            if b is not None
        )
        changed = zip(self._buffer_versions, versions, allowed, strict=True)
        if any(before != after and not may for before, after, may in changed):
            raise ExecutionError(
                "a stage changed a buffer, and did not when the model was profiled: it would begin "
                "with another when it runs again; profile and plan again as it now is"
            )

    def check(self) -> None:
        """Raise if the model has changed since the forward pass in a way that matters to gradients.

        Raises:
            ExecutionError: A parameter or buffer was changed, moved or taken out meanwhile.
        """
        prepared = self.prepared
        for slots, bound in zip(prepared.slots, self.bound, strict=True):
            missing = slots.missing()
            if missing:
                raise ExecutionError(
                    f"{missing} was taken out of its module between forward and backward, so the "
                    "stages that use it cannot run again; change the model after the backward"
                )
            for now, alias in zip(slots.in_place(), bound, strict=True):
                if now is not None and alias is not None and now.device != alias.device:
                    name = prepared.inspection.parameter_name(now)
                    raise ExecutionError(
                        f"parameter {name!r} was on {alias.device} in the "
                        f"forward pass and is on {now.device} now; move the model before the "
                        "forward pass"
                    )
        versions = zip(
            self._buffer_versions, self._versions_of_buffers(), self._unchanged, strict=True
        )
        for before, after, steady in versions:
            if steady and before != after:
                raise ExecutionError(
                    "a buffer that the forward pass left alone was changed in place before the "
                    "backward, so stages would run again with another; call backward before"
                )
        for parameter, version in zip(self.parameters, self._versions, strict=True):
            if parameter._version != version:
                name = prepared.inspection.parameter_name(parameter)
                raise ExecutionError(
                    f"parameter {name!r} was changed in place "
                    "between forward and backward; call backward before optimizer.step"
                )

        if self.given.versions() != self._given_versions:
            raise ExecutionError(
                "an input that every stage is given was changed in place since the forward pass "
                "began, so stages would run again with another; change a copy instead"
            )

    def begin_backward(self) -> None:
        """Record the settings and modes of the caller of a backward, to return to them."""
        around = Ambient.take(self.device)
        wanted = self._ambient.found_from(around)
        self._wanted = self._around = around
        if wanted != around:
            self._wanted = wanted
        if around.operations:
            self.prepared.expected.check_modes_of_backward(around, self._ambient)
        convolves = any(p.dim() > 2 for p in self.parameters)  # or may, by its parameters
        if convolves and wanted.settings != around.settings:
            self.prepared.expected.check_backward(around)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Keep other threads out, and restore the settings and modes of the forward pass."""
        with self.prepared.alone(self._within), self._wanted.again(self._around), OneWay():
            yield

    def going_back(self, first: int, last: int) -> AbstractContextManager[None]:
        """Restore what a backward finds under autograd: settings, modes, random state, buffers.

        Args:
            first: The first of the stages that it goes back through.
            last: The last of them.
        """
        around = self._wanted.going_back_to(self._around)
        return around if self._replay is None else self._replay.going_back(first, last, around)

    def again(self) -> AbstractContextManager[None]:
        """The context of stages that run again, with that of the user's `context_fn`."""
        return Recomputing() if self.prepared.context_fn is None else self._again_in_context()

    @contextmanager
    def _again_in_context(self) -> Iterator[None]:
        assert self.prepared.context_fn is not None
        # Autocast is looked at in there, and entered without its cache of cast weights.
        with (
            contexts(self.prepared.context_fn)[1],
            Autocast.take(self.device).again(),
            Recomputing(),
        ):
            yield

    def modes(self, blocks: Iterable[int]) -> AbstractContextManager[None]:
        """Set the modules of some blocks to train or eval as in the forward pass.

        Args:
            blocks: Indices of the blocks.
        """
        changed = [
            (module, module.training)
            for k in blocks
            for module, flag in zip(self.prepared.slots[k].modules, self._modes[k], strict=True)
            if module.training != flag
        ]
        return self._turned(changed) if changed else nullcontext()

    @contextmanager
    def _turned(self, changed: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
        try:
            for module, now in changed:
                module.training = not now
            yield
        finally:
            for module, now in changed:
                module.training = now

    def parameters_replaced(
        self, blocks: Sequence[int], bound: Sequence[Sequence[Tensor | None]]
    ) -> AbstractContextManager[None]:
        """Replace the parameters of some blocks by other tensors.

        Args:
            blocks: Indices of the blocks.
            bound: What to put there, by block and place, such as `bound` of this object.
        """
        if len(blocks) == 1:  # nearly always, and there is one a block
            return self.prepared.slots[blocks[0]].parameters_replaced(bound[blocks[0]])
        return self._all_replaced(blocks, bound)

    @contextmanager
    def _all_replaced(
        self, blocks: Sequence[int], bound: Sequence[Sequence[Tensor | None]]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for k in blocks:
                slots = self.prepared.slots[k]
                stack.enter_context(slots.parameters_replaced(bound[k]))
            yield

    def check_buffers(self, stage: int) -> None:
        """Refuse to run a stage again, if it is one, whose buffers a backward has changed.

        Args:
            stage: The stage, counted from 1.

        Raises:
            ExecutionError: A buffer that no forward may change is another, or was written to.
        """
        if self._replay is not None:
            self._replay.check(stage)

    @contextmanager
    def traceless(self, blocks: Iterable[int]) -> Iterator[None]:
        """Undo what stages that run again do to random state and buffers.

        Args:
            blocks: Indices of the blocks whose stages run again.
        """
        random = self._random_state if self.prepared.chain.draws else None
        replay = Replay(self.prepared, blocks, self._buffers, self._steady, random)
        self._replay = replay
        try:
            with replay.entered():
                yield
        finally:
            self._replay = None

    def begin_again(self) -> None:
        """Put random state and hidden buffers back to the start of the forward pass."""
        if self._generators is not None:
            self._generators.restore()
        if self._hidden_at_first:
            self.put_hidden(self._hidden_at_first)


@final
class StateSnapshot:
    """Random state and hidden buffers with which recomputation from a stored state begins."""

    __slots__ = ("_hidden", "_random", "_seen")

    def __init__(self, seen: ForwardSnapshot, random: RandomState | None, hidden: Values) -> None:
        self._seen, self._random, self._hidden = seen, random, hidden

    def restore(self) -> None:
        """Put everything back; buffers only where clones stand in for them."""
        if self._random is not None:
            self._random.restore()
        if self._hidden:
            self._seen.put_hidden(self._hidden)
