"""Probes one stage: whether it can be run again, and which state, draws and outputs it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..base.errors import CkptschedError, ProfileError
from ..capture.model_state import ModelState
from ..capture.signature import stage_label
from ..capture.stage_discovery import StageCall, TracedBlock
from ..recompute.parameter_swap import Slot, Slots
from ..recompute.side_outputs import Look, cut_all
from ..recompute.stateful_buffers import BufferWatch, every_generator, is_write_only
from ..recompute.tape import Alone, Carries, Tape, record, run_alone, run_under, sources_of
from ..tensors.comparison import agree
from ..tensors.devices import drawn_elsewhere
from ..tensors.pytree import Extras, State, storages
from ..torch_state.replay_context import RandomState
from .refusals import failures_named, refuse_tensors, shape_text
from .side_output_search import Found, find_side_outputs, rewritten_weights
from .stage_kind import StageKind, Standing, gradients_of_sides, held_of_input, take_sides


def examine(
    block: TracedBlock,
    call: StageCall,
    x: State,
    extras: Extras,
    wanted: tuple[Carries, ...],
    standing: Standing,
    whole: ModelState,
    *,
    may_ask: bool,
) -> StageKind:
    """Run a stage on one input until it is known what it depends on and what it leaves.

    Args:
        block: The block that it belongs to.
        call: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        extras: What every stage is given besides.
        wanted: For each tensor of the input what it carries.
        standing: Storages that are there before and after.
        whole: What the model was when nothing had run.
        may_ask: Whether it may let its input require a gradient, which the caller then sees.

    Raises:
        ProfileError: It fails, or cannot be run again with the same result.
    """
    name = call.title
    given = [leaf for leaf in extras.apart().leaves if leaf.requires_grad]
    collecting = [*Slots([call.module]).parameters(), *given]
    with failures_named(f"stage {name!r}", x):
        probe = _Probe(name, call, x, extras, whole, wanted)
        output = probe.run_twice()
        if may_ask:  # the caller sees what becomes of the input
            probe.wanted = wanted = probe.asked()
        found = Found() if x.leaves[0].is_meta else probe.side_outputs(collecting)
        tape, taped, left = probe.record()
        _check_gradients(name, tape, collecting)
        own_leaves = _makes_leaves(probe, tape, collecting, [*found.tensors, *left])
        alone = probe.find_way(output, taped)
        if found.tensors:  # those of the latest run are there
            tape, taped, left = probe.record()
        for tensor in found.tensors:
            tensor.requires_grad_(False)
        probe.look()
    leaves = tape.repeated_leaves()
    aliases = list({id(leaf): leaf for leaf in collecting if leaf.requires_grad}.values())
    return StageKind(
        name=stage_label(block, call.name),
        call=call,
        x=x,
        extras=extras,
        output=taped if alone else output,
        wanted=wanted,
        carries=tape.carries,
        aliases=aliases,
        repeated=[alias for alias in aliases if id(alias) in leaves],
        draws=probe.draws,
        foreign=probe.foreign,
        standing=standing,
        alone=alone,
        own_leaves=own_leaves,
        hidden=probe.hidden,
        sides=gradients_of_sides(found.tensors),
        looks=bool(found.tensors),
        left=[t.requires_grad_() for t in left if id(t) not in rewritten_weights(call.module)],
        piles_up=found.piles_up,
        left_bytes=(probe.replaced_bytes + probe.cached_bytes + held_of_input(x, found.tensors)),
    )


def _check_gradients(name: str, tape: Tape, collecting: Iterable[Tensor]) -> None:
    """Raise if the forward of a stage has called `backward()` itself."""
    if tape.is_used or any(leaf.grad is not None for leaf in collecting):
        raise ProfileError(
            f"stage {name!r} calls backward() in its forward, which adds to the .grad of "
            "parameters and inputs each time that it runs; use torch.autograd.grad, which does not"
        )


def _makes_leaves(
    probe: _Probe, tape: Tape, collecting: Iterable[Tensor], left: Iterable[Tensor]
) -> bool:
    """Whether a stage uses leaves that it makes itself, anew in every run.

    Args:
        probe: It runs the stage again.
        tape: Of a run.
        collecting: What collects gradients.
        left: What runs so far have left besides their outputs; a later one may read that.

    Raises:
        ProfileError: It uses others, whose gradients would be lost.
    """
    known = {id(leaf) for leaf in collecting}
    unknown = {
        key: leaf for key, (leaf, _) in tape.contents()[0].leaves.items() if key not in known
    }
    if not unknown:
        return False
    again, *_ = probe.record()
    others = {id(tensor): tensor for tensor in left}
    once_more = again.contents()[0].leaves.keys()
    strange = (unknown.keys() & others.keys()) | (once_more & (unknown | others).keys())
    for key in strange:
        leaf = (unknown | others)[key]
        kind = "parameter" if isinstance(leaf, nn.Parameter) else "tensor"
        what = (
            f": {shape_text(leaf)}, which requires a gradient" if isinstance(leaf, Tensor) else ""
        )
        raise ProfileError(
            f"stage {probe.name!r} uses a {kind} that its module does not own, or a tensor that "
            f"another stage left in an attribute or a list{what}, so its gradient would be lost; "
            "register the parameter, or the module that owns it, in the stage, or give the tensor "
            "to the model as a further argument that requires a gradient; let a stage return what "
            "a later one needs; and where stages add up their auxiliary losses, let each append "
            "its own to a list, and sum up the list when the model has returned"
        )
    return True


class _AsksForGradients(Exception):
    """A stage without gradients let its input require one."""


class _Probe:
    """Runs one stage repeatedly from the same state, to find out what it depends on."""

    def __init__(
        self,
        name: str,
        call: StageCall,
        x: State,
        extras: Extras,
        whole: ModelState,
        wanted: tuple[Carries, ...],
    ) -> None:
        self.name, self.call, self.x, self.extras = name, call, x, extras
        self.wanted = wanted
        self._alone = Alone.PLAIN  # how it is run
        self._leaves_sides = False
        slots = Slots([call.module])
        self._whole, self._found = whole, ModelState(slots.modules, whole=whole)
        self._writes = False  # to what is no buffer, each time
        self._sets_up = False  # plain tensors, in its first run
        self.hidden: tuple[Slot, ...] = ()
        """Places of buffers that it changes, and may read."""
        self.draws = False
        """Whether it draws random numbers."""
        self.foreign = False
        """Whether it draws from generators that are not torch's."""
        self.replaced_bytes = 0
        """Bytes of buffers that it puts in the place of others."""
        self.cached_bytes = 0
        """Bytes of plain tensors that it makes once and keeps."""
        self._buffers = storages(slots.buffers())
        self._watch = BufferWatch(slots)
        self._own = every_generator(slots.modules, extras.apart().constants())
        self._random = self._random_now()

    def _parts(self) -> list[nn.Module]:
        """The modules of the stage, looked at anew: its runs may have made some."""
        return [*self.call.module.modules()]

    def _random_now(self) -> RandomState:
        return RandomState.take(self.x.leaves[0].device, self._own)

    def begin_again(self) -> None:
        """Restore random state and hidden buffers to before the first run."""
        self._random.restore()
        if self._writes:
            self._found.put_back()
        self._watch.put_back(self.hidden)

    @torch.no_grad()
    def run_twice(self) -> State:
        """Run the stage, and again from the same random state and hidden buffers.

        Without gradients, or where it fails so, as a stage does that differentiates, with them.

        Returns:
            Its output.

        Raises:
            ProfileError: It gives another result, or does what cannot be done again.
        """
        try:
            return self._run_twice()
        except CkptschedError:
            raise
        except Exception as error:
            if not self._fails_again():
                raise ProfileError(
                    f"stage {self.name!r} failed once, and not when it was run again: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._alone = Alone.DIFFERENTIATES
            return self._run_twice()

    def _fails_again(self) -> bool:
        """Whether it cannot run without gradients; all is put back to where it began."""
        try:
            self._put_all_back()
            self._run()
        except Exception:
            return True
        finally:
            self._put_all_back()
        return False

    def _put_all_back(self) -> None:
        self._watch.put_back(self._watch.changed())
        self.begin_again()

    def record(self) -> tuple[Tape, State, list[Tensor]]:
        """Run the stage with its tape, from where it began.

        Returns:
            The tape, its output, and its side outputs without their graphs.
        """
        self.begin_again()
        look = self._looking()
        tape, output = record(self.call, self.x, wanted=self.wanted, extras=self.extras, look=look)
        return tape, output, take_sides(tape, look)

    def _looking(self) -> Look | None:
        return Look() if self._leaves_sides else None

    def asked(self) -> tuple[Carries, ...]:
        """What the tensors of the input carry after a run, which may let them require gradients."""
        if self._alone is Alone.PLAIN:
            return self.wanted
        self.begin_again()
        with torch.enable_grad():
            _, source = sources_of(self.x, self.wanted)
            run_under(None, self.call, source, self.extras)
        return tuple(
            Carries.ASKED if leaf.requires_grad and not carried else carried
            for leaf, carried in zip(source.leaves, self.wanted, strict=True)
        )

    def side_outputs(self, collecting: Sequence[Tensor]) -> Found:
        """The side outputs of the stage.

        Args:
            collecting: What collects its gradients.

        Raises:
            ProfileError: It cannot be followed there.
        """

        def find(*, keeps: bool = True) -> Found:
            return find_side_outputs(
                self.name,
                self.call,
                self.x,
                wanted=self.wanted,
                extras=self.extras,
                aliases=collecting,
                module=self.call.module,
                keeps=keeps,
                again=self.begin_again,
            )

        try:
            found = find()
        except CkptschedError:
            raise
        except RuntimeError as error:  # torch.func allows no hooks of what is saved
            found = find(keeps=False)
            if found.tensors:
                raise ProfileError(
                    f"stage {self.name!r} leaves a tensor with a graph by another way than its "
                    f"output, where it cannot be found again ({error}); let it return the tensor"
                ) from error
        self._leaves_sides = bool(found.tensors)
        return found

    def find_way(self, output: State, taped: State) -> Alone:
        """Find a way to run the stage without a tape that gives the same bits as with one.

        Args:
            output: What `run_twice` returned.
            taped: Its output with a tape.

        Raises:
            ProfileError: It does not.
        """
        # Some kernels round otherwise without gradients, such as those of oneDNN's LSTM.
        plain = self._alone is Alone.PLAIN and all(map(agree, output.leaves, taped.leaves))
        # With side outputs it runs with gradients on in any case.
        if not plain or self._leaves_sides:
            self._alone = Alone.FORGETS
            try:
                found = self._gives_again(taped, list(taped.leaves))
            except (CkptschedError, RuntimeError):  # it went back, or torch.func allows no hooks
                found = False
            if not found:
                self._alone = Alone.DIFFERENTIATES
                self._check_same(self._gives_again(taped, list(taped.leaves)))
        return Alone.PLAIN if plain and self._alone is not Alone.DIFFERENTIATES else self._alone

    def _run_twice(self) -> State:
        output = self._run_first()
        changed, self.replaced_bytes = self._watch.changed(), self._watch.replaced_bytes()
        self.hidden = tuple([place for place in changed if not is_write_only(place)])
        self._check_output(output)
        # Where it lies in a buffer, the second run may change it: a copy is compared.
        first = [
            leaf.clone() if self._buffers.keys() & storages([leaf]).keys() else leaf
            for leaf in output.leaves
        ]
        kept = self._plain_tensors()
        same = self._gives_again(output, first)
        self.cached_bytes = self._bytes_kept(kept, output)
        if not same and len(changed) > len(self.hidden):
            self.hidden = tuple(changed)
            same = self._gives_again(output, first)
        self._check_same(same)
        return output

    def _check_same(self, same: bool) -> None:
        if not same:
            rebound = self._found.rebound()
            such = f" (it changes {', '.join(map(repr, rebound[:4]))})" if rebound else ""
            raise ProfileError(
                f"stage {self.name!r} gives another result when it is run again on the same input "
                "with the same random state and buffers: it keeps a state of its own that is no "
                f"buffer{such}, or draws from a generator that is no attribute of its modules and "
                "no argument; keep the state in a buffer (register_buffer), the generator as an "
                "attribute"
            )

    def _run(self) -> State:
        """Run the stage as it is run where no tape is kept."""
        x = self.x.detached()
        look = self._looking()
        output = run_alone(
            self.call, x, wanted=self.wanted, extras=self.extras, how=self._alone, look=look
        ).detached()
        if look is not None:
            cut_all(look.take())
        if any(leaf.requires_grad for leaf in x.leaves):
            raise _AsksForGradients
        return output

    def _run_first(self) -> State:
        given = self.extras.apart()
        elsewhere = drawn_elsewhere(self.x.leaves[0].device)
        versions = self.x.versions(), given.versions()
        output = self._run()
        # Where it lies is looked at later.
        refuse_tensors(f"the output of stage {self.name!r}", output.leaves, without_data=True)
        now = self._random_now()
        self.draws, self.foreign = now != self._random, now.foreign != self._random.foreign
        self._sets_up = self._whole.note_set_up(self._found)
        self.look()
        if (self.x.versions(), given.versions()) != versions:
            what = "its input" if self.x.versions() != versions[0] else "what every stage is given"
            raise ProfileError(
                f"stage {self.name!r} changes {what} in place, so it cannot be run again; use an "
                "operation that is not in place, or make it one module with the stage before it; "
                "a first stage that writes into the batch, as some augmentations do, must write "
                "into a copy (x = x.clone()), or be switched off"
            )
        if drawn_elsewhere(self.x.leaves[0].device) != elsewhere:
            raise ProfileError(
                f"stage {self.name!r} draws random numbers on another device than its input is on, "
                "whose random state is not put back when it runs again; draw where the input is"
            )
        return output

    def look(self) -> None:
        """Record whether the stage changes anything but buffers in place.

        Raises:
            ProfileError: It replaces a parameter.
        """
        replaced = self._found.replaced()
        if replaced:
            raise ProfileError(
                f"stage {self.name!r} puts another tensor in the place of {replaced} in its "
                "forward, whose gradient would be lost; make parameters before the model is "
                "profiled (run a model that makes them itself once, under torch.no_grad), and keep "
                "what a stage changes in a buffer: register_buffer"
            )
        self._writes |= self._whole.note_unfit(self._found, f"stage {self.name!r}")

    def _plain_tensors(self) -> dict[int, int]:
        return ModelState(self._parts(), whole=self._whole, copied=False).attribute_storages()

    def _bytes_kept(self, kept: dict[int, int], output: State) -> int:
        """Bytes of plain tensors that the first run made, and that the second left alone."""
        passed = storages([*self.x.leaves, *output.leaves, *self.extras.apart().leaves])
        known = passed.keys() | self._found.attribute_storages().keys()
        still = self._plain_tensors().keys() - known
        return sum(size for home, size in kept.items() if home in still)

    def _check_output(self, output: State) -> None:
        """Refuse a state that lies in a buffer which the next run changes."""
        buffers = [module._buffers[name] for module, name in self.hidden]
        now = storages([buffer for buffer in buffers if buffer is not None])
        if not now.keys().isdisjoint(storages(output.leaves)):
            raise ProfileError(
                f"stage {self.name!r} returns a buffer that it reads and changes, so its output "
                "changes when it is run again; return a copy (buffer.clone())"
            )

    def _gives_again(self, output: State, first: list[Tensor]) -> bool:
        self.begin_again()
        looks = self._sets_up and not self._writes
        before = ModelState(self._parts(), whole=self._whole) if looks else None
        again = self._run()
        if before is not None and self._whole.note_unfit(before, f"stage {self.name!r}"):
            self._writes = True
            return self._gives_again(output, first)  # from where it began in everything
        shapes = output.describe(shape_text), again.describe(shape_text)
        if shapes[0] != shapes[1]:
            raise ProfileError(
                f"stage {self.name!r} returned {shapes[0]} and, run again on the same input, "
                f"{shapes[1]}; a stage must depend on its input and parameters only"
            )
        return all(map(agree, first, again.leaves))
