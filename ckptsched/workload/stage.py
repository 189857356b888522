"""One stage of a chain: its figures in the planning model, and its exact bytes.

The figures are those of the memory-persistent recurrence of Beaumont et al. (RR-9302), with the
bytes that its published implementations leave out: the gradient that a backward consumes,
separate overheads of forward and backward, and parameter gradients that appear as the backward
pass goes. A `StageLedger` adds what the simulator needs to charge a stage to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from ..base.errors import WorkloadError

_BACKWARD_VARIANTS = 8
# A petabyte, or thirty billion years. Sums over 1,000 such stages do not overflow 64 bits, nor
# those over 100,000 stages of some terabytes.
_MOST_BYTES = 2**50
_MOST_SECONDS = 1e18
_MOST_OTHER_TAPES = 255  # an option takes a byte of a packed operation
TAPE_SIZES = ("tape_bytes", "forward_overhead_bytes", "backward_overhead_bytes")
_OTHER_SIZES = ("gradient_bytes", "parameter_gradient_bytes")
LEDGER_SIZES = ("state_bytes", "tape_bytes", "forward_peak_bytes", "taped_peak_bytes")
_LEDGER_FLAGS = ("output_is_view", "input_saved", "output_saved", "shares_parameters_partly")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """Exact bytes of one stage whose input or output lies in several storages."""

    inputs: int
    """Number of storages of the input."""
    output_bytes: tuple[int, ...]
    """Bytes of each storage of the output."""
    output_sources: tuple[int, ...]
    """For each of them which storage of the input it is, counted from 0; -1 for a new one."""
    saved_inputs: tuple[int, ...]
    """Storages of the input that the tape keeps."""
    saved_outputs: tuple[int, ...]
    """New storages of the output that the tape keeps."""
    backward_peak_bytes: tuple[int, ...]
    """Peak of the backward above the level before it, by which of the kept storages outlive the
    tape: bit k of the index for the k-th of the saved inputs and outputs. Twice: where the
    parameter gradients are there already, then where they come into being. Of two lengths: all
    combinations, or for more than four storages none and any."""

    @property
    def new_bytes(self) -> int:
        """Bytes of the output's storages that are not the input's."""
        pairs = zip(self.output_bytes, self.output_sources, strict=True)
        return sum(size for size, source in pairs if source < 0)

    def backward_peak(self, outlives: tuple[bool, ...], *, first: bool) -> int:
        """The peak of the backward, by which of the saved inputs and outputs outlive the tape.

        `first` tells whether the parameter gradients come into being in this backward.
        """
        half = len(self.backward_peak_bytes) // 2
        mask = sum(held << k for k, held in enumerate(outlives))
        if half != 1 << len(outlives):
            mask = int(any(outlives))
        return self.backward_peak_bytes[half * first + mask]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TapeBounds:
    """What a tape of a stage is compared with while it runs: the most that the profile saw."""

    saved_bytes: int
    """Storages that a walk of the tape finds besides input, output, parameters and buffers."""
    largest_bytes: int
    """The largest of these storages: what operations take for a while goes by it."""
    used_bytes: int
    """Bytes of the parameters that it uses."""
    varies: bool = False
    """Whether the stage reads data or draws to decide what it computes: two tapes that look alike
    may then take other bytes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StageLedger:
    """Exact bytes of one stage, as a run of the stage alone shows them."""

    state_bytes: int
    """Storage bytes of the output."""
    output_is_view: bool
    """Whether the output lies in the input's storage."""
    tape_bytes: int
    """Storages that the tape keeps besides input, output, parameters and buffers."""
    input_saved: bool
    """Whether the tape keeps the input's storage."""
    output_saved: bool
    """Whether the tape keeps the output's storage."""
    forward_peak_bytes: int
    """Peak of a run without tape above the level before it, output included."""
    taped_peak_bytes: int
    """Peak of a run with tape above the level before it, tape and output included."""
    backward_peak_bytes: tuple[int, ...]
    """Peak of the backward above the level before it, by `backward_variant`."""
    shares_parameters_partly: bool = False
    """Whether some but not all of its parameter gradients exist before its first backward."""
    parts: StageParts | None = None
    """The storages one by one where input or output have several; the figures above then bound
    them from below."""
    bounds: TapeBounds | None = None
    """What tapes are compared with while the stage runs; None in chains that do not say."""


def backward_variant(*, input_held: bool, output_held: bool, first: bool) -> int:
    """Index into `StageLedger.backward_peak_bytes`, from 0 to 7.

    Held are storages that outlive the tape; `first` tells whether the stage's parameter gradients
    come into being in this backward.
    """
    return 4 * input_held + 2 * output_held + first


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TapeOption:
    """Another way to run a stage with tape: with fewer bytes and more seconds, say."""

    name: str = ""
    """Name for people."""
    tape_bytes: int
    """Bytes of the tape, the output state included (w_t)."""
    forward_seconds: float
    """Seconds of one run with this tape."""
    backward_seconds: float
    """Seconds of the backward from it."""
    forward_overhead_bytes: int = 0
    """Extra bytes while the run with tape goes on (o_f)."""
    backward_overhead_bytes: int = 0
    """Extra bytes while the backward runs (o_b)."""
    ledger: StageLedger | None = None
    """Exact bytes of the stage with this tape; None where only the planning model is known."""
    again: tuple[str, ...] = ()
    """What the backward makes again first, by the names of its calls, where that is known."""

    @property
    def seconds(self) -> float:
        """Seconds of the run and the backward together."""
        return self.forward_seconds + self.backward_seconds


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One link of the chain; equal steps of an ODE block share one object."""

    name: str = ""
    """Name within its block."""
    forward_seconds: float
    """Seconds of one run without tape (u_f)."""
    backward_seconds: float
    """Seconds of the backward, and what a run with tape takes longer (u_b)."""
    state_bytes: int
    """Bytes of the output state (w_a)."""
    tape_bytes: int
    """Bytes of the tape, the output state included (w_t)."""
    gradient_bytes: int
    """Bytes of the gradient with respect to the output state (w_g)."""
    forward_overhead_bytes: int = 0
    """Extra bytes while a forward runs (o_f)."""
    backward_overhead_bytes: int = 0
    """Extra bytes while the backward runs (o_b)."""
    parameter_gradient_bytes: int = 0
    """Parameter gradients that appear with this stage's backward and stay (w_p)."""
    ledger: StageLedger | None = None
    """Exact bytes; None where only the planning model is known."""
    other_tapes: tuple[TapeOption, ...] = ()
    """Tapes that can be kept instead of the stage's own: options 1, 2 and so on of a run with
    tape. Option 0 is the stage's own tape."""
    once: bool = False
    """Whether a plan may run it once only, with a tape that is kept until its backward."""

    @property
    def tapes(self) -> tuple[TapeOption, ...]:
        """All tapes by option, the stage's own first."""
        own = TapeOption(
            tape_bytes=self.tape_bytes,
            forward_seconds=self.forward_seconds,
            backward_seconds=self.backward_seconds,
            forward_overhead_bytes=self.forward_overhead_bytes,
            backward_overhead_bytes=self.backward_overhead_bytes,
            ledger=self.ledger,
        )
        return (own, *self.other_tapes)

    @property
    def ledgers(self) -> tuple[StageLedger, ...]:
        """Exact bytes of the stage by tape, its own first; empty where not all are known."""
        if self.ledger is None:
            return ()
        found = (self.ledger, *[x.ledger for x in self.other_tapes if x.ledger is not None])
        return found if len(found) == 1 + len(self.other_tapes) else ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A run of consecutive stages that belong together, such as the steps of an ODE."""

    name: str
    """Path of the block in the model."""
    first: int
    """Its first stage, counted from 1."""
    last: int
    """Its last stage."""
    buffer_bytes: int = 0
    """Buffers that are cloned while the block is run again."""
    hidden_bytes: int = 0
    """Buffers that its stages read and change, and those of no block after it: a snapshot with a
    state holds those of all blocks that run on from it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a plan must match: the model's structure and the shapes of one batch."""

    structure: str
    """Digest of the blocks, their stages, and all parameter and buffer shapes."""
    input_shape: tuple[int, ...]
    """Shape of the input."""
    input_stride: tuple[int, ...]
    """Its strides: the memory format decides which kernels run."""
    input_dtype: str
    """Its dtype, such as "torch.float32"."""
    input_requires_grad: bool
    """Whether the gradient with respect to the input is computed."""
    device: str
    """Type of the device, such as "cpu"."""
    threads: int
    """Threads of the CPU, on which the workspaces of convolutions depend."""
    training: str
    """Which modules trained: "train", "eval", or a digest where they differed."""
    autocast: str
    """Autocast as it was, such as "cpu to torch.bfloat16", or "off"."""
    torch_version: str
    """Version of torch that was measured."""
    inputs: str = ""
    """Structure and layout of all arguments where they are more than one tensor."""
    carries: str = ""
    """Which tensors of each state carry a gradient, such as "1x0 9x1"; empty: all do. 2 and 3
    stand for leaves (see `tape.Carries`)."""
    need_tapes: str = ""
    """How each stage runs without a tape, such as "3x0 1x1", by the numbers of `tape.Alone`; empty:
    all without gradients."""
    own_leaves: str = ""
    """Which stages make leaves that require gradients, such as "3x0 1x1"; empty: none."""
    sides: str = ""
    """Which stages leave tensors with a graph by another way than their output, such as "3x0 1x1";
    empty: none."""
    hidden: tuple[str, ...] = ()
    """Names of the buffers that stages read and change."""
    frozen: int = 0
    """How many leading stages, as traced, need no gradient and are run as one; 0 for none."""
    unfit: str = ""
    """Why the model can follow no plan; empty where it can."""
    settings: tuple[str, ...] = ()
    """torch's settings that decide which kernels run, such as "default dtype: torch.float32"; empty
    in plans of older versions, which do not know them."""
    hooks: str = ""
    """What packed the tensors that autograd saves; empty: nothing did."""
    modes: tuple[str, ...] = ()
    """Classes of the modes that see every operation or call of torch, and may take bytes."""
    mode_bytes: int = 0
    """What these kept of one run of each stage and its backward, for good: no plan has it."""
    recorded: int = 0
    """Of a model that was recorded, how many calls the recording has; else 0."""
    cuts: tuple[int, ...] = ()
    """Before which of these calls a stage begins, the first apart."""
    whole: str = ""
    """Why the model is one stage though it was to be recorded, or which parts of a recorded one are
    called whole, and why; empty where none is."""
    never: tuple[int, ...] = ()
    """Of a recorded model, which calls run once a step, by index."""
    always: tuple[int, ...] = ()
    """Which calls lean tapes may make again whatever they cost, by index."""
    policy: str = ""
    """What has asked for these, such as "never_recompute=[Attention]"; empty where nothing has."""
    foreign: bool = False
    """Whether stages draw from random generators that are not torch's: Python's or numpy's."""


def check_size(what: str, value: object) -> None:
    """Refuse what is no number of bytes, or such a large one that sums would overflow."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WorkloadError(f"{what} must be a whole number of bytes, 0 or more; found {value!r}")
    if value > _MOST_BYTES:
        raise WorkloadError(f"{what} must be at most {_MOST_BYTES} bytes; found {value}")


def check_time(what: str, value: object) -> None:
    """Refuse what is no number of seconds, or such a large one that sums would overflow."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise WorkloadError(f"{what} must take 0 seconds or more; found {value!r}")
    if value > _MOST_SECONDS:
        raise WorkloadError(f"{what} must take at most {_MOST_SECONDS:g} seconds; found {value!r}")


def check_stage(what: str, stage: Stage) -> None:
    """Refuse a stage with impossible sizes or times."""
    _check_figures(what, stage, (*TAPE_SIZES, "state_bytes", *_OTHER_SIZES))
    _check_tape(f"the tape of {what}", stage, stage.state_bytes)
    _check_flags(what, stage, ("once",))
    if len(stage.other_tapes) > _MOST_OTHER_TAPES:
        raise WorkloadError(
            f"{what} offers {len(stage.other_tapes)} other tapes; {_MOST_OTHER_TAPES} at most"
        )
    for k, option in enumerate(stage.other_tapes, 1):
        name = f"tape {k} of {what}"
        _check_figures(name, option, TAPE_SIZES)
        _check_tape(name, option, stage.state_bytes)
        for call in option.again:
            check_name(f"what {name} makes again", call)
        if option.ledger is not None:
            _check_ledger(f"the ledger of {name}", option.ledger)
            _check_same_states(name, stage.ledger, option.ledger)
    if stage.ledger is not None:
        _check_ledger(f"the ledger of {what}", stage.ledger)


def _check_figures(what: str, run: Stage | TapeOption, sizes: Sequence[str]) -> None:
    check_name(what, run.name)
    check_time(f"the forward of {what}", run.forward_seconds)
    check_time(f"the backward of {what}", run.backward_seconds)
    _check_sizes(what, run, sizes)


def _check_tape(what: str, tape: Stage | TapeOption, state_bytes: int) -> None:
    if tape.tape_bytes < state_bytes:
        raise WorkloadError(
            f"{what} has {tape.tape_bytes} bytes, fewer than the {state_bytes} of the state that "
            "it contains"
        )


def _check_sizes(what: str, holder: object, names: Sequence[str]) -> None:
    for name in names:
        check_size(f"{name} of {what}", getattr(holder, name))


def _check_flags(what: str, holder: object, names: Sequence[str]) -> None:
    for name in names:
        if not isinstance(getattr(holder, name), bool):
            raise WorkloadError(
                f"{name} of {what} must be true or false, found {getattr(holder, name)!r}"
            )


def check_name(what: str, name: object) -> None:
    """Refuse a name that is no text."""
    if not isinstance(name, str):
        raise WorkloadError(f"the name of {what} must be a text, found {name!r}")


def _check_same_states(what: str, own: StageLedger | None, other: StageLedger) -> None:
    """Refuse exact bytes of a tape by which the stage would read or make another state."""
    if own is None or _states(own) != _states(other):
        raise WorkloadError(
            f"the ledger of {what} has other states than the ledger of the stage's own tape: a "
            "tape does not change what a stage reads and makes"
        )


def _states(ledger: StageLedger) -> tuple[object, ...]:
    parts = ledger.parts
    rest = parts and (parts.inputs, parts.output_bytes, parts.output_sources)
    return ledger.state_bytes, ledger.output_is_view, rest


def _check_ledger(what: str, ledger: StageLedger) -> None:
    _check_sizes(what, ledger, LEDGER_SIZES)
    found = len(ledger.backward_peak_bytes)
    if found != _BACKWARD_VARIANTS:
        raise WorkloadError(
            f"backward_peak_bytes of {what} needs {_BACKWARD_VARIANTS} values, found {found} values"
        )
    for value in ledger.backward_peak_bytes:
        check_size(f"backward_peak_bytes of {what}", value)
    _check_flags(what, ledger, _LEDGER_FLAGS)
    if ledger.bounds is not None:
        _check_sizes(what, ledger.bounds, ("saved_bytes", "largest_bytes", "used_bytes"))
        _check_flags(what, ledger.bounds, ("varies",))
