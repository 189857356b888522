"""Stages as JSON: a column a symbol, what else distinct stages have once for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from ..base.errors import WorkloadError
from .stage import Stage, StageLedger, StageParts, TapeBounds, TapeOption

_Column: TypeAlias = tuple[str, str, bool]
"""Key, attribute of `Stage`, whether it holds seconds."""
COLUMNS: tuple[_Column, ...] = (
    ("u_f", "forward_seconds", True),
    ("u_b", "backward_seconds", True),
    ("w_a", "state_bytes", False),
    ("w_t", "tape_bytes", False),
    ("w_g", "gradient_bytes", False),
    ("o_f", "forward_overhead_bytes", False),
    ("o_b", "backward_overhead_bytes", False),
    ("w_p", "parameter_gradient_bytes", False),
)
_WITH_INPUT = ("w_a", "w_g")  # these begin with a figure of the input
# Those of a further tape of a stage.
_TAPE_COLUMNS = tuple(row for row in COLUMNS if row[0] in ("u_f", "u_b", "w_t", "o_f", "o_b"))
# Of distinct stages besides columns: a name, exact bytes, other tapes, whether they run once.
_Kind: TypeAlias = tuple[str, StageLedger | None, tuple[TapeOption, ...], bool]
_PLAIN: _Kind = ("", None, (), False)


def figures_of(stage: Stage) -> dict[str, float]:
    """The planning model's figures of a stage by their symbols.

    One type a symbol, so that what is read back has the same fingerprint.
    """
    return _figures(stage, COLUMNS)


def _figures(holder: Stage | TapeOption, columns: Sequence[_Column]) -> dict[str, float]:
    return {
        key: (float if is_time else int)(getattr(holder, attribute))
        for key, attribute, is_time in columns
    }


def columns_of(stages: Sequence[Stage], inputs: Sequence[int]) -> dict[str, Any]:
    """Stages as columns, with the index of what is not of the planning model where there is some.

    `inputs` are the bytes of the input and of its gradient.
    """
    rows = [figures_of(stage) for stage in stages]
    data: dict[str, Any] = {key: [row[key] for row in rows] for key, _, _ in COLUMNS}
    for key, size in zip(_WITH_INPUT, inputs, strict=True):
        data[key].insert(0, size)
    kinds: dict[_Kind, int] = {}
    index = [
        kinds.setdefault((stage.name, stage.ledger, stage.other_tapes, stage.once), len(kinds))
        for stage in stages
    ]
    if any(kind != _PLAIN for kind in kinds):
        data["kind"] = index
        data["kinds"] = [_kind_to_json(*kind) for kind in kinds]
    return data


def _kind_to_json(
    name: str, ledger: StageLedger | None, tapes: tuple[TapeOption, ...], once: bool
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": name,
        "ledger": None if ledger is None else asdict(ledger),
    }
    if tapes:
        data["tapes"] = [_tape_to_json(tape) for tape in tapes]
    if once:
        data["once"] = True
    return data


def _tape_to_json(tape: TapeOption) -> dict[str, Any]:
    data: dict[str, Any] = {"name": tape.name} | _figures(tape, _TAPE_COLUMNS)
    if tape.again:
        data["again"] = list(tape.again)
    return data if tape.ledger is None else data | {"ledger": asdict(tape.ledger)}


def stages_from(
    data: Mapping[str, Any], size: int, time: float
) -> tuple[tuple[Stage, ...], list[Any]]:
    """Read `columns_of`'s data: the stages, and the bytes of the input and of its gradient.

    Columns but the first four may be left out; `size` is the bytes, `time` the seconds of one unit.
    A WorkloadError for a column of another length, or a value that is no number.
    """
    columns = _read_columns(data, size, time)
    inputs = [columns[key].pop(0) for key in _WITH_INPUT]
    return _build_stages(columns, *_read_kinds(data, len(columns["u_f"]), size, time)), inputs


def check_number(what: str, value: object) -> None:
    """Refuse what is no number."""
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
    for key, _, is_time in COLUMNS:
        column = data.get(key, defaults.get(key))
        expected = n + (key in _WITH_INPUT)
        if not isinstance(column, (list, tuple)) or len(column) != expected:
            found = "nothing" if column is None else f"{len(column)} values"
            raise WorkloadError(f"column {key!r} needs {expected} values, found {found}")
        for value in column:
            check_number(f"each value of column {key!r}", value)
        columns[key] = [value * time if is_time else value * size for value in column]
    return columns


def _read_kinds(
    data: Mapping[str, Any], n: int, size: int, time: float
) -> tuple[list[_Kind], Sequence[int]]:
    """What distinct stages have besides columns, and which of them each is."""
    kinds: list[_Kind] = [_PLAIN]
    if "kinds" in data:
        kinds = [
            (
                kind["name"],
                _read_ledger(kind["ledger"]),
                tuple(_read_tape(tape, size, time) for tape in kind.get("tapes", ())),
                kind.get("once", False),
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
        check_number(f"{key} of a tape", value)
        values[attribute] = value * (time if is_time else size)
    return TapeOption(
        name=data.get("name", ""),
        ledger=_read_ledger(data.get("ledger")),
        again=tuple(data.get("again", ())),
        **values,
    )


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


def _build_stages(
    columns: Mapping[str, list[Any]],
    kinds: Sequence[_Kind],
    index: Sequence[int],
) -> tuple[Stage, ...]:
    """Build the stages, one object for equal ones."""
    cache: dict[tuple[Any, ...], Stage] = {}
    stages = []
    for i, kind in enumerate(index):
        values = tuple(columns[key][i] for key, _, _ in COLUMNS)
        stage = cache.get((kind, *values))
        if stage is None:
            name, ledger, tapes, once = kinds[kind]
            fields: dict[str, Any] = {
                attribute: value for (_, attribute, _), value in zip(COLUMNS, values, strict=True)
            }
            stage = Stage(name=name, ledger=ledger, other_tapes=tapes, once=once, **fields)
            cache[(kind, *values)] = stage
        stages.append(stage)
    return tuple(stages)
