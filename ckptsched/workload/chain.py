"""What is planned: a chain of stages, an input and a loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, ClassVar, Self, final

import numpy as np
import numpy.typing as npt

from ..base.errors import WorkloadError
from ..base.json_files import printable
from .saved import Saved
from .stage import (
    Block,
    Signature,
    check_name,
    check_size,
    check_stage,
    check_time,
)
from .stage_json import COLUMNS, check_number, columns_of, stages_from
from .tables import chain_html
from .values import StageValues, check_values, values_from_json, values_to_json

_SIZE_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
# What equal stages have in common: all figures but the parameter gradients.
_ALIKE = attrgetter(*(name for _, name, _ in COLUMNS[:-1]), "ledger")
_OF_POLICY = ("never", "always", "policy")
_TUPLES = ("hidden", "settings", "modes", "cuts", "never", "always")  # of a signature


@final
@dataclass(frozen=True, slots=True)
class ChainArrays:
    """The planning model in columns; index i is stage or state i, index 0 the input."""

    forward_seconds: npt.NDArray[np.float64]
    backward_seconds: npt.NDArray[np.float64]
    state_bytes: npt.NDArray[np.int64]
    tape_bytes: npt.NDArray[np.int64]
    gradient_bytes: npt.NDArray[np.int64]
    forward_overhead_bytes: npt.NDArray[np.int64]
    backward_overhead_bytes: npt.NDArray[np.int64]
    parameter_gradient_bytes: npt.NDArray[np.int64]


@final
@dataclass(frozen=True, kw_only=True)
class Chain(Saved):
    """A sequence of stages, an input and a loss.

    Stages are counted from 1; state 0 is the input and state n what the loss sees. Repeated steps
    refer to one object.
    """

    draws: bool = False
    """Whether a stage draws random numbers, so that random states must be put back."""
    random_state_bytes: int = 0
    """Bytes of one snapshot; 0 where no stage draws, and on CUDA, where it lies on the host."""
    kept_bytes: int = 0
    """Those of the held bytes that are held from the start: hidden state as the step began, and
    what modules keep of their last run as attributes."""
    blocks: tuple[Block, ...] = ()
    """Blocks that cover the stages; none where the chain has no such structure."""
    seconds_spread: float = 0.0
    """By how much two halves of the rounds of timing differed, as a share of all seconds."""
    signature: Signature | None = None
    """What a model and a batch must match to be run by a plan of this chain."""
    values: tuple[StageValues, ...] = ()
    """For each stage of a recorded model what it reads and makes itself of its states; none where
    that is not known."""
    layouts: tuple[str, ...] = ()
    """For people: shape and dtype of each state, the input's first, such as "float32[8, 64]"; fewer
    where they are not known of all. No plan depends on them."""

    kind: ClassVar[str] = "chain"
    needs: ClassVar[str] = "the columns " + ", ".join(key for key, _, _ in COLUMNS[:4])

    def __post_init__(self) -> None:
        """Refuse sizes, times and blocks that are out of range, by a WorkloadError."""
        if not self.stages:
            raise WorkloadError("a chain needs at least one stage, found none")
        self._check_whole()
        check_size("the chain's random_state_bytes", self.random_state_bytes)
        check_size("the chain's kept_bytes", self.kept_bytes)
        check_name("the chain", self.name)
        check_time("the chain's seconds_spread", self.seconds_spread)
        seen: set[int] = set()
        for i, stage in enumerate(self.stages, 1):
            if id(stage) not in seen:
                seen.add(id(stage))
                check_stage(f"stage {i}", stage)
        check_values(self.values, [stage.ledger for stage in self.stages])
        expected = 1
        for block in self.blocks:
            check_name(f"the block from stage {block.first}", block.name)
            check_size(f"buffer_bytes of block {block.name!r}", block.buffer_bytes)
            check_size(f"hidden_bytes of block {block.name!r}", block.hidden_bytes)
            if block.first != expected or block.last < block.first:
                raise WorkloadError(
                    f"blocks must cover the stages in order: {block.name!r} covers "
                    f"{block.first}..{block.last}, expected a start at {expected}"
                )
            expected = block.last + 1
        if self.blocks and expected != len(self.stages) + 1:
            raise WorkloadError(f"blocks end at stage {expected - 1} of {len(self.stages)}")
        for layout in set(self.layouts):
            check_name("the layout of a state", layout)

    @functools.cached_property
    def arrays(self) -> ChainArrays:
        """The planning model in columns."""
        of_input = {"state_bytes": self.input_bytes, "gradient_bytes": self.input_gradient_bytes}
        columns: dict[str, npt.NDArray[Any]] = {}
        for _, name, is_time in COLUMNS:
            figures = (of_input.get(name, 0), *(getattr(x, name) for x in self.stages))
            columns[name] = np.fromiter(figures, dtype=np.float64 if is_time else np.int64)
            columns[name].flags.writeable = False
        return ChainArrays(**columns)

    @functools.cached_property
    def has_ledger(self) -> bool:
        """Whether exact bytes are known of every stage, with each of its tapes."""
        return all(stage.ledgers for stage in self.stages)

    @functools.cached_property
    def offers_tapes(self) -> bool:
        """Whether some stage can be taped in more than one way."""
        return any(stage.other_tapes for stage in self.stages)

    @functools.cached_property
    def store_all_seconds(self) -> float:
        """Seconds of the step when nothing is run twice, and every tape is the fastest."""
        times = [self.loss_seconds]
        for stage in self.stages:
            fastest = min(stage.tapes, key=lambda x: x.seconds) if stage.other_tapes else stage
            times += fastest.forward_seconds, fastest.backward_seconds
        return math.fsum(times)

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether all stages have the same seconds and bytes, and one tape each.

        Parameter gradients may appear with the backward of the last stage alone, as those of
        shared parameters do: then they are there, and alike, whatever is run again.
        """
        if self.offers_tapes or any(stage.parameter_gradient_bytes for stage in self.stages[:-1]):
            return False
        first = self.stages[0]
        alike = _ALIKE(first)
        return all(stage is first or _ALIKE(stage) == alike for stage in self.stages)

    def stage_name(self, i: int) -> str:
        """Name of stage i for people: its block, its name, its number among equals."""
        stage = self.stages[i - 1]
        block = next((b for b in self.blocks if b.first <= i <= b.last), None)
        if block is None:
            return printable(stage.name) or f"stage {i}"
        label = printable(".".join(part for part in (block.name, stage.name) if part))
        same = block.last > block.first and all(
            self.stages[j - 1].name == stage.name for j in range(block.first, block.last + 1)
        )
        return f"{label}[{i - block.first}]" if same else label

    def _repr_html_(self) -> str:
        """For notebooks: a table of the blocks, or of the stages."""
        return chain_html(self, f"chain {printable(self.name)} of {len(self)} stages")

    def to_json(self) -> dict[str, Any]:
        """The chain as JSON data: a column a symbol, exact bytes once a distinct stage."""
        inputs = self.input_bytes, self.input_gradient_bytes
        data: dict[str, Any] = {"name": self.name, "size_unit": "bytes", "time_unit": "s"}
        data |= {"n": len(self), **columns_of(self.stages, inputs)}
        data["u_loss"] = float(self.loss_seconds)
        data["o_loss"] = self.loss_overhead_bytes
        data["w_held"] = self.held_bytes
        data["draws"] = self.draws
        data["random_state_bytes"] = self.random_state_bytes
        data["kept_bytes"] = self.kept_bytes
        if self.seconds_spread:
            data["seconds_spread"] = float(self.seconds_spread)
        data["blocks"] = [asdict(block) for block in self.blocks]
        data["signature"] = None if self.signature is None else asdict(self.signature)
        if self.values:
            data["values"] = values_to_json(self.values)
        for key in _OF_POLICY if self.signature else ():
            if not data["signature"][key]:
                del data["signature"][key]  # so that chains without one are what they were
        if self.layouts:
            data["layouts"] = list(self.layouts)
        return data

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        size = _unit(data, "size_unit", "bytes", _SIZE_UNITS)
        time = _unit(data, "time_unit", "s", _TIME_UNITS)
        stages, (input_bytes, input_gradient_bytes) = stages_from(data, size, time)
        for key in ("o_loss", "w_held", "u_loss"):
            check_number(key, data.get(key, 0))
        return cls(
            stages=stages,
            input_bytes=input_bytes,
            input_gradient_bytes=input_gradient_bytes,
            loss_seconds=data.get("u_loss", 0.0) * time,
            loss_overhead_bytes=data.get("o_loss", 0) * size,
            held_bytes=data.get("w_held", 0) * size,
            draws=data.get("draws", data.get("random_state_bytes", 0) > 0),
            random_state_bytes=data.get("random_state_bytes", 0),
            kept_bytes=data.get("kept_bytes", 0),
            blocks=tuple(Block(**block) for block in data.get("blocks", ())),
            seconds_spread=data.get("seconds_spread", 0.0),
            name=data.get("name", ""),
            signature=_read_signature(data.get("signature")),
            values=values_from_json(data.get("values", ())),
            layouts=tuple(data.get("layouts", ())),
        )


def _unit(data: Mapping[str, Any], key: str, default: str, known: Mapping[str, Any]) -> Any:
    name = data.get(key, default)
    if not isinstance(name, str) or name not in known:
        raise WorkloadError(f"{key} {name!r} is unknown; give one of {', '.join(known)}")
    return known[name]


def _read_signature(data: Mapping[str, Any] | None) -> Signature | None:
    if data is None:
        return None
    tuples = {key: tuple(data[key]) for key in ("input_shape", "input_stride")}
    tuples |= {key: tuple(data.get(key, ())) for key in _TUPLES}
    return Signature(**{**data, **tuples})
