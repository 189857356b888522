"""What is planned: a chain of stages, an input and a loss, and its JSON."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

from ..base.errors import WorkloadError
from ..base.json_files import fault_of_seal, printable, read_json, sealed, write_atomically
from .stage import (
    Block,
    Signature,
    Stage,
    StageLedger,
    StageParts,
    TapeBounds,
    TapeOption,
    check_name,
    check_size,
    check_stage,
    check_time,
)

_SIZE_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
WRITES_ONE = "`ckptsched profile MODEL -o FILE` writes a chain, `ckptsched plan` a plan"
"""What to do where a file cannot be read."""
_CHAIN_SIZES = (
    "input_bytes",
    "input_gradient_bytes",
    "loss_overhead_bytes",
    "held_bytes",
    "random_state_bytes",
    "kept_bytes",
)


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
class Chain:
    """A sequence of stages, an input and a loss.

    Stages are counted from 1; state 0 is the input and state n what the loss sees.
    """

    stages: tuple[Stage, ...]
    """The n stages; repeated steps refer to one object."""
    input_bytes: int = 0
    """Bytes of the input (w_a[0]); 0 where the caller holds it and it is reserved."""
    input_gradient_bytes: int = 0
    """Bytes of the gradient with respect to the input (w_g[0])."""
    loss_seconds: float = 0.0
    """Seconds of the loss (u_loss)."""
    loss_overhead_bytes: int = 0
    """Extra bytes while the loss runs (o_loss)."""
    held_bytes: int = 0
    """Bytes that the caller holds from the output to the end of the step (w_held)."""
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
    name: str = ""
    """Name for people."""
    signature: Signature | None = None
    """What a model and a batch must match to be run by a plan of this chain."""

    def __post_init__(self) -> None:
        """Check sizes, times and blocks.

        Raises:
            WorkloadError: With the stage and the value that is out of range.
        """
        if not self.stages:
            raise WorkloadError("a chain needs at least one stage, found none")
        for name in _CHAIN_SIZES:
            check_size(f"the chain's {name}", getattr(self, name))
        check_name("the chain", self.name)
        check_time("the loss", self.loss_seconds)
        check_time("the chain's seconds_spread", self.seconds_spread)
        seen: set[int] = set()
        for i, stage in enumerate(self.stages, 1):
            if id(stage) not in seen:
                seen.add(id(stage))
                check_stage(f"stage {i}", stage)
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

    def __len__(self) -> int:
        """The number of stages n."""
        return len(self.stages)

    @functools.cached_property
    def arrays(self) -> ChainArrays:
        """The planning model in columns."""

        def column(head: float, values: Iterable[float], dtype: type) -> Any:
            filled: npt.NDArray[Any] = np.fromiter((head, *values), dtype=dtype)
            filled.flags.writeable = False
            return filled

        s, n_g = self.stages, self.input_gradient_bytes
        return ChainArrays(
            forward_seconds=column(0.0, (x.forward_seconds for x in s), np.float64),
            backward_seconds=column(0.0, (x.backward_seconds for x in s), np.float64),
            state_bytes=column(self.input_bytes, (x.state_bytes for x in s), np.int64),
            tape_bytes=column(0, (x.tape_bytes for x in s), np.int64),
            gradient_bytes=column(n_g, (x.gradient_bytes for x in s), np.int64),
            forward_overhead_bytes=column(0, (x.forward_overhead_bytes for x in s), np.int64),
            backward_overhead_bytes=column(0, (x.backward_overhead_bytes for x in s), np.int64),
            parameter_gradient_bytes=column(0, (x.parameter_gradient_bytes for x in s), np.int64),
        )

    @functools.cached_property
    def has_ledger(self) -> bool:
        """Whether every stage has exact bytes; those of other tapes are never known."""
        return all(x.ledger is not None and not x.other_tapes for x in self.stages)

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
        first = self.stages[0]
        same = all(
            stage is first
            or (
                stage.forward_seconds == first.forward_seconds
                and stage.backward_seconds == first.backward_seconds
                and stage.state_bytes == first.state_bytes
                and stage.tape_bytes == first.tape_bytes
                and stage.gradient_bytes == first.gradient_bytes
                and stage.forward_overhead_bytes == first.forward_overhead_bytes
                and stage.backward_overhead_bytes == first.backward_overhead_bytes
                and stage.ledger == first.ledger
            )
            for stage in self.stages
        )
        if self.offers_tapes:
            return False
        return same and not any(stage.parameter_gradient_bytes for stage in self.stages[:-1])

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

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that planning and executing depend on."""
        data = self.to_json()
        data.pop("name", None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The chain as JSON data, in bytes and seconds."""
        return chain_to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Chain:
        """Read a chain from JSON data.

        Args:
            data: The keys of the chain model; `size_unit` and `time_unit` are optional.

        Raises:
            WorkloadError: Missing keys, wrong lengths, impossible values, unknown units.
        """
        return chain_from_json(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chain to a JSON file, with a checksum; it appears whole or not at all."""
        write_atomically(path, json.dumps(sealed(self.to_json())) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Chain:
        """Read a chain from a JSON file: one that `save` wrote, or one written by hand.

        Raises:
            WorkloadError: The file is missing, is not JSON, holds no chain, or was changed after
                it was saved.
        """
        return cls.from_saved(read_json(path, WorkloadError, WRITES_ONE), repr(str(path)))

    @classmethod
    def from_saved(cls, data: Any, source: str) -> Chain:
        """Read a chain from the data of a file, and check that it was not changed.

        Args:
            data: The data. Without a checksum they are figures of somebody's own, which no model
                may be run by.
            source: Where they are from, for messages.

        Raises:
            WorkloadError: They are no chain, or were changed after they were saved.
        """
        if not isinstance(data, dict):
            raise WorkloadError(f"{source} holds {type(data).__name__}, not a chain")
        measured = data.get("signature") is not None
        if (measured or "checksum" in data) and (fault := fault_of_seal(data)):
            raise WorkloadError(
                f"{source} was changed after it was saved: {fault}; restore the file or profile "
                "again. Figures of your own are read without checksum and signature"
            )
        try:
            return cls.from_json(data)
        except WorkloadError as error:
            raise WorkloadError(f"{source}: {error}") from error


# Column key, attribute of Stage, whether it holds seconds.
_COLUMNS = (
    ("u_f", "forward_seconds", True),
    ("u_b", "backward_seconds", True),
    ("w_a", "state_bytes", False),
    ("w_t", "tape_bytes", False),
    ("w_g", "gradient_bytes", False),
    ("o_f", "forward_overhead_bytes", False),
    ("o_b", "backward_overhead_bytes", False),
    ("w_p", "parameter_gradient_bytes", False),
)
# Those of a further tape of a stage.
_TAPE_COLUMNS = tuple(row for row in _COLUMNS if row[0] in ("u_f", "u_b", "w_t", "o_f", "o_b"))
# What distinct stages have besides columns: a name, exact bytes, other tapes.
_Kind: TypeAlias = tuple[str, StageLedger | None, tuple[TapeOption, ...]]
_PLAIN: _Kind = ("", None, ())


def chain_to_json(chain: Chain) -> dict[str, Any]:
    """The chain as JSON data: a column a symbol, exact bytes once a distinct stage."""
    data: dict[str, Any] = {"name": chain.name, "size_unit": "bytes", "time_unit": "s"}
    data["n"] = len(chain)
    heads = {"w_a": chain.input_bytes, "w_g": chain.input_gradient_bytes}
    for key, attribute, is_time in _COLUMNS:
        # One type a column, so that what is read back has the same fingerprint.
        kind = float if is_time else int
        column = [kind(getattr(stage, attribute)) for stage in chain.stages]
        data[key] = [heads[key], *column] if key in heads else column
    data["u_loss"] = float(chain.loss_seconds)
    data["o_loss"] = chain.loss_overhead_bytes
    data["w_held"] = chain.held_bytes
    data["draws"] = chain.draws
    data["random_state_bytes"] = chain.random_state_bytes
    data["kept_bytes"] = chain.kept_bytes
    kinds: dict[_Kind, int] = {}
    index = [
        kinds.setdefault((stage.name, stage.ledger, stage.other_tapes), len(kinds))
        for stage in chain.stages
    ]
    if any(kind != _PLAIN for kind in kinds):
        data["kind"] = index
        data["kinds"] = [_kind_to_json(*kind) for kind in kinds]
    if chain.seconds_spread:
        data["seconds_spread"] = float(chain.seconds_spread)
    data["blocks"] = [asdict(block) for block in chain.blocks]
    data["signature"] = None if chain.signature is None else asdict(chain.signature)
    return data


def _kind_to_json(
    name: str, ledger: StageLedger | None, tapes: tuple[TapeOption, ...]
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": name,
        "ledger": None if ledger is None else asdict(ledger),
    }
    if tapes:
        data["tapes"] = [
            {"name": tape.name}
            | {
                key: (float if is_time else int)(getattr(tape, attribute))
                for key, attribute, is_time in _TAPE_COLUMNS
            }
            for tape in tapes
        ]
    return data


def chain_from_json(data: Mapping[str, Any]) -> Chain:
    """Read `chain_to_json`'s data, or a file that has only the planning model's keys."""
    try:
        size = _unit(data, "size_unit", "bytes", _SIZE_UNITS)
        time = _unit(data, "time_unit", "s", _TIME_UNITS)
        columns = _read_columns(data, size, time)
        for key in ("o_loss", "w_held"):
            _check_number(key, data.get(key, 0))
        _check_number("u_loss", data.get("u_loss", 0.0))
        return Chain(
            stages=_build_stages(columns, *_read_kinds(data, len(columns["u_f"]), size, time)),
            input_bytes=columns["w_a"][0],
            input_gradient_bytes=columns["w_g"][0],
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
        )
    except WorkloadError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise WorkloadError(
            f"this is not a chain ({type(error).__name__}: {error}); it needs the columns "
            + ", ".join(key for key, _, _ in _COLUMNS[:4])
        ) from error


def _unit(data: Mapping[str, Any], key: str, default: str, known: Mapping[str, Any]) -> Any:
    name = data.get(key, default)
    if not isinstance(name, str) or name not in known:
        raise WorkloadError(f"{key} {name!r} is unknown; give one of {', '.join(known)}")
    return known[name]


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WorkloadError(f"{what} must be a number, found {value!r}")


def _read_columns(data: Mapping[str, Any], size: int, time: float) -> dict[str, list[Any]]:
    n = len(data["u_f"])
    if data.get("n", n) != n:
        raise WorkloadError(f"n is {data['n']!r}, but column 'u_f' has {n} values")
    defaults: dict[str, Sequence[Any]] = {
        "w_g": data["w_a"],
        "o_f": [0] * n,
        "o_b": [0] * n,
        "w_p": [0] * n,
    }
    columns: dict[str, list[Any]] = {}
    for key, _, is_time in _COLUMNS:
        column = data.get(key, defaults.get(key))
        expected = n + 1 if key in ("w_a", "w_g") else n
        if not isinstance(column, (list, tuple)) or len(column) != expected:
            found = "nothing" if column is None else f"{len(column)} values"
            raise WorkloadError(f"column {key!r} needs {expected} values, found {found}")
        for value in column:
            _check_number(f"each value of column {key!r}", value)
        columns[key] = [value * time if is_time else value * size for value in column]
    return columns


def _read_kinds(
    data: Mapping[str, Any], n: int, size: int, time: float
) -> tuple[list[_Kind], Sequence[int]]:
    """Names, exact bytes and other tapes of distinct stages, and which of them each has."""
    kinds: list[_Kind] = [_PLAIN]
    if "kinds" in data:
        kinds = [
            (
                kind["name"],
                _read_ledger(kind["ledger"]),
                tuple(_read_tape(tape, size, time) for tape in kind.get("tapes", ())),
            )
            for kind in data["kinds"]
        ]
    index = data.get("kind", [0] * n)
    if not isinstance(index, (list, tuple)) or len(index) != n:
        found = f"{len(index)} values" if isinstance(index, (list, tuple)) else repr(index)
        raise WorkloadError(f"column 'kind' needs {n} values, found {found}")
    for value in index:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(kinds):
            raise WorkloadError(
                f"each value of column 'kind' counts from 0 to below {len(kinds)}, the number of "
                f"kinds; found {value!r}"
            )
    return kinds, index


def _read_tape(data: Mapping[str, Any], size: int, time: float) -> TapeOption:
    values = {}
    for key, attribute, is_time in _TAPE_COLUMNS:
        value = data[key] if key in ("u_f", "u_b", "w_t") else data.get(key, 0)
        _check_number(f"{key} of a tape", value)
        values[attribute] = value * (time if is_time else size)
    return TapeOption(name=data.get("name", ""), **values)


def _read_ledger(data: Mapping[str, Any] | None) -> StageLedger | None:
    if data is None:
        return None
    parts = data.get("parts")
    if parts is not None:
        lists: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in parts.items()
        }
        parts = StageParts(**lists)
    bounds = data.get("bounds")
    if bounds is not None:
        bounds = TapeBounds(**bounds)
    peaks = tuple(data["backward_peak_bytes"])
    return StageLedger(**{**data, "backward_peak_bytes": peaks, "parts": parts, "bounds": bounds})


def _read_signature(data: Mapping[str, Any] | None) -> Signature | None:
    if data is None:
        return None
    tuples = {key: tuple(data[key]) for key in ("input_shape", "input_stride")}
    tuples |= {key: tuple(data.get(key, ())) for key in ("hidden", "settings", "modes", "cuts")}
    return Signature(**{**data, **tuples})


def _build_stages(
    columns: Mapping[str, list[Any]],
    kinds: Sequence[_Kind],
    index: Sequence[int],
) -> tuple[Stage, ...]:
    """Build the stages, one object for equal ones."""
    cache: dict[tuple[Any, ...], Stage] = {}
    stages = []
    for i, kind in enumerate(index):
        values = tuple(
            columns[key][i + 1 if key in ("w_a", "w_g") else i] for key, _, _ in _COLUMNS
        )
        stage = cache.get((kind, *values))
        if stage is None:
            name, ledger, tapes = kinds[kind]
            fields: dict[str, Any] = {
                attribute: value for (_, attribute, _), value in zip(_COLUMNS, values, strict=True)
            }
            stage = Stage(name=name, ledger=ledger, other_tapes=tapes, **fields)
            cache[(kind, *values)] = stage
        stages.append(stage)
    return tuple(stages)
