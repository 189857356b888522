"""The times of a fixed grid's steps, and the steps that the requested times fall into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import WorkloadError
from ...torch_state.torch_modes import as_number, as_numbers
from ..function.options import check_fixed_options, read_function, read_step_size

_MOST = 10**8
"""Steps of a grid; Python's list of the times of more would take gigabytes by itself."""

_AT_ONCE = 64
"""Times that are laid out as tensors together. All at once would take 26 bytes a step, which no
budget of a solve knows of."""


@final
@dataclass(frozen=True)
class TimeGrid:
    """The times of all steps of a fixed grid, and the outputs that each step gives."""

    times: tuple[float, ...]
    """Ends of the steps, one more than there are steps."""
    outputs: tuple[tuple[tuple[int, float], ...], ...]
    """For each step the outputs that fall into it: the index of the output, from 1 on, and its
    place as a share of the step; 1 at its end. Between the ends a line is drawn, as torchdiffeq
    does."""
    clock: Tensor | None = None
    """The same times and, after them, those of the outputs, as a tensor of one dimension, where
    their gradient is wanted."""

    @property
    def count(self) -> int:
        """Number of outputs, that at the first time included."""
        return 1 + sum(map(len, self.outputs))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    @property
    def between(self) -> bool:
        """Whether any output lies within a step, where a line is drawn."""
        return any(share != 1.0 for outputs in self.outputs for _, share in outputs)


def check_times(t: Any) -> None:
    """Refuse an argument `t` of `odeint` that is no sequence of times.

    That is a one-dimensional floating-point tensor of at least two finite times that all rise or
    all fall; the message of the WorkloadError says where.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() != 1:
        found = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise WorkloadError(
            f"t is {found}; give the times as a one-dimensional floating-point tensor, the first "
            "that of y0"
        )
    values = as_numbers(t)
    if len(values) < 2:
        raise WorkloadError(
            f"t holds {len(values)} times; give at least two: that of y0 and one to solve to"
        )
    _check_monotone("t", values, t.dtype)


def resolution_note(before: float, after: float, dtype: torch.dtype) -> str:
    """The end of an error about two times in a row that their dtype may not tell apart.

    Empty where the times are further apart than the rounding of the dtype.
    """
    largest = max(abs(before), abs(after))
    spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    if abs(after - before) > spacing:
        return ""
    return (
        f". Times of {dtype} near {largest:.6g} are {spacing:.3g} apart: if steps are to be "
        "smaller, give t in torch.float64, or count time from its start"
    )


def _check_monotone(what: str, values: list[float], dtype: torch.dtype) -> None:
    for k, value in enumerate(values):
        if not math.isfinite(value):
            raise WorkloadError(f"{what}[{k}] is {value}; all times must be finite")
    rising = values[1] > values[0]
    for k, (before, after) in enumerate(itertools.pairwise(values)):
        if before == after or (after > before) != rising:
            raise WorkloadError(
                f"{what} must rise throughout or fall throughout; found {what}[{k}] = {before!r} "
                f"and {what}[{k + 1}] = {after!r}{resolution_note(before, after, dtype)}"
            )


def make_grid(
    func: Callable[..., Any], y0: Any, t: Tensor, options: Mapping[str, Any], *, timed: bool
) -> TimeGrid:
    """Lay out the steps of a fixed grid; without an option, one leads from each time to the next.

    A grid constructor gets func and the caller's y0; `timed` tells whether the gradient of t is
    wanted. A WorkloadError for options that make no sense, or a grid that does not lead from the
    first time to the last.
    """
    check_fixed_options(options)
    wanted = as_numbers(t)
    tensor = _lay(func, y0, t, options) if timed or options.get("step_size") is None else None
    times = _equal_steps(t, options["step_size"]) if tensor is None else as_numbers(tensor)
    if len(times) < 2 or (times[0], times[-1]) != (wanted[0], wanted[-1]):
        raise WorkloadError(
            f"the grid has {len(times)} times"
            f"{f', from {times[0]!r} to {times[-1]!r}' if times else ''}; it must lead from "
            f"t[0] = {wanted[0]!r} to t[-1] = {wanted[-1]!r}"
        )
    # Equal steps that lead to the very end, where rounding counts one more, are followed by one of
    # no length: the gradient of the last time is that step's.
    ends_twice = options.get("step_size") is not None and times[-2:] == [times[-1]] * 2
    dtype = t.dtype if tensor is None else tensor.dtype
    _check_monotone("the grid", times[: len(times) - ends_twice], dtype)
    clock = torch.cat([tensor, t]) if timed and tensor is not None else None
    return TimeGrid(tuple(times), _place(times, wanted), clock)


def _lay(func: Callable[..., Any], y0: Any, t: Tensor, options: Mapping[str, Any]) -> Tensor:
    step_size, constructor = options.get("step_size"), read_function(options, "grid_constructor")
    if step_size is None and constructor is None:
        return t
    if constructor is not None:
        grid = constructor(func, y0, t)
        if not isinstance(grid, Tensor) or grid.dim() != 1:
            raise WorkloadError(
                f"the grid constructor returned {type(grid).__name__}; let it return the times of "
                "the steps as a one-dimensional tensor"
            )
        return grid
    start, end, count, signed = _equal(t, step_size)
    inner = torch.arange(0, max(count, 1), dtype=t.dtype, device=t.device) * signed + start
    beyond = math.copysign(1.0, signed) * (inner - end).detach() > 0  # by rounding
    return torch.cat([inner[~beyond], end[None]])


def _equal_steps(t: Tensor, step_size: Any) -> list[float]:
    """The numbers of the grid that `_lay` makes of a step size, a few times at once."""
    start, end, count, signed = _equal(t, step_size)
    last, sign, times = as_number(end), math.copysign(1.0, signed), []
    for first in range(0, max(count, 1), _AT_ONCE):
        index = torch.arange(first, min(first + _AT_ONCE, max(count, 1)), device=t.device)
        times += as_numbers(index.to(t.dtype) * signed + start)
    return [*(time for time in times if sign * time <= sign * last), last]


def _equal(t: Tensor, step_size: Any) -> tuple[Tensor, Tensor, int, float]:
    """First and last time, the number of equal steps, and their size with its sign."""
    size = read_step_size(step_size)
    start, end = t[0], t[-1]
    # In the dtype of t, and one more less one, as torchdiffeq counts: rounding decides alike.
    wanted = as_number(torch.ceil((end - start).detach().abs() / size + 1))
    if wanted > _MOST:
        raise WorkloadError(
            f"a step_size of {step_size!r:.80} from {as_number(start):g} to {as_number(end):g} "
            f"would take {wanted:.3g} steps; give one that takes {_MOST:.0e} at most"
        )
    sign = 1.0 if as_number(end) > as_number(start) else -1.0
    return start, end, int(wanted) - 1, sign * size


def _place(times: list[float], wanted: list[float]) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Which outputs each step gives; the first time is that of the initial state."""
    sign = 1.0 if times[-1] > times[0] else -1.0
    placed = []
    j = 1
    for index, (start, end) in enumerate(itertools.pairwise(times)):
        here = []
        before = len(wanted) - (index < len(times) - 2)  # the last one is the last step's
        while j < before and sign * wanted[j] <= sign * end:
            share = 1.0 if wanted[j] == end else (wanted[j] - start) / (end - start)
            here.append((j, share))
            j += 1
        placed.append(tuple(here))
    return tuple(placed)
