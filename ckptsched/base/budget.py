"""Bytes as people write them, and what a budget covers.

The one rounding rule of the library lives here: where a figure is rounded for people,
sizes go up and budgets go down.
"""

from __future__ import annotations

import contextlib
import enum
import math
import numbers
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

from .device_memory import available_bytes, bytes_beside
from .errors import BudgetSyntaxError

_UNITS = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TEXT = re.compile(r"^\s*([+-]?[0-9._]+(?:e[+-]?[0-9]{1,3})?)\s*([a-z]*|%)\s*$", re.IGNORECASE)
_OF = re.compile(r"^\s*([0-9._]+)\s*%\s*of\s+(.*?)\s*$", re.IGNORECASE)
_EVERYTHING = ("storing everything", "store-all", "store_all")
_REMEDY = (
    'give a positive number of bytes, or text such as "512MiB", "1.5 GB" or "40%", or '
    '"90% of the device"'
)
DEVICE_SHARE = 0.9
"""Of a device what a training may use where nothing else is said; the rest is a margin."""
COUNTED = (
    "what a step makes: states and tapes, gradients of parameters, the output and the loss with "
    "their gradients; not parameters, buffers, optimizer and batch"
)
"""What a budget counts, in words."""


class Tier(enum.IntEnum):
    """Where a value lies."""

    DEVICE = 0
    HOST = 1
    DISK = 2


@final
@dataclass(frozen=True)
class Link:
    """How fast values move between two tiers."""

    bytes_per_second: float
    """Bandwidth."""
    latency_seconds: float = 0.0
    """Seconds that a copy takes however small it is."""

    def seconds(self, size: int) -> float:
        """Seconds to copy `size` bytes."""
        return self.latency_seconds + size / self.bytes_per_second


@final
@dataclass(frozen=True)
class Budget:
    """Bytes that one training step may use, forward and backward together.

    A budget bounds the peak of the tensor bytes that come into being between the start
    of the forward pass and the end of the backward pass. Parameters, buffers, optimizer
    state and the input batch are reserved: they are not counted.
    """

    bytes: int | None = None
    """The bound in bytes; None where it is a share of plain autograd's need."""
    share: Fraction | None = None
    """The bound as a share of what storing everything needs; None where it is in bytes."""
    reserved_bytes: int = 0
    """Bytes of the bound that are taken already (`Budget.total`)."""

    def __post_init__(self) -> None:
        """Refuse what no step can be planned for.

        Raises:
            BudgetSyntaxError: Not exactly one of the two bounds, one that is no number or not
                positive, or reserved bytes that are negative, too many, or beside a share.
        """
        if (self.bytes is None) == (self.share is None):
            raise BudgetSyntaxError(
                f"a budget is bytes or a share, found bytes={self.bytes}, share={self.share}; "
                + _REMEDY
            )
        for name, value in (("bytes", self.bytes), ("reserved_bytes", self.reserved_bytes)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise BudgetSyntaxError(
                    f"{name} of a budget must be a whole number, found {value!r}; {_REMEDY}"
                )
        if self.reserved_bytes < 0 or (self.share is not None and self.reserved_bytes):
            raise BudgetSyntaxError(
                f"{self.reserved_bytes} bytes cannot be reserved: 0 or more, and of a budget in "
                "bytes only"
            )
        if self.bytes is not None and self.bytes <= self.reserved_bytes:
            left = f"leaves nothing after {self.reserved_bytes} reserved bytes"
            fault = left if self.reserved_bytes else "is not positive"
            raise BudgetSyntaxError(f"a budget of {self.bytes} bytes {fault}; {_REMEDY}")
        if self.share is not None and not isinstance(self.share, Fraction):
            raise BudgetSyntaxError(f"a share must be a Fraction, found {self.share!r}; {_REMEDY}")
        if self.share is not None and self.share <= 0:
            raise BudgetSyntaxError(f"a budget of {float(self.share):%} is not positive; {_REMEDY}")

    @classmethod
    def total(cls, limit: int | str, reserved_bytes: int) -> Budget:
        """Bound the whole device instead of the step.

        Args:
            limit: Bytes of the device that may be used, reserved ones included.
            reserved_bytes: Bytes of parameters, buffers, optimizer state and input.

        Returns:
            A budget of what remains.
        """
        budget = parse_budget(limit)
        if budget.bytes is None:
            raise BudgetSyntaxError(f"a total needs bytes, found {limit!r}; {_REMEDY}")
        return cls(bytes=budget.bytes, reserved_bytes=reserved_bytes)

    @classmethod
    def device(
        cls,
        device: Any = None,
        *,
        share: float = DEVICE_SHARE,
        model: Any = None,
        optimizer: Any = None,
        batch: Any = None,
        reserved_bytes: int = 0,
    ) -> Budget:
        """Bound a step by what a device has free now, less what training takes besides.

        Args:
            device: Such as "cuda:1", "cpu" or a torch.device; None for the current CUDA device
                where there is one, else the CPU.
            share: How much of what is free may be used: the rest is a margin for what the
                allocator and the libraries take.
            model: The model, whose parameters and buffers are reserved if they are elsewhere yet.
            optimizer: What keeps a state: its bytes, an optimizer of torch.optim, or a name such
                as "adamw" for the model's trained parameters.
            batch: One batch, in bytes or as tensors, reserved if it is elsewhere yet.
            reserved_bytes: Bytes besides.

        Returns:
            A budget of what remains. Gradients of parameters are part of the step, and are not
            reserved.

        Raises:
            BudgetSyntaxError: The device is not there or does not say what is free, the share is
                not above 0 and up to 1, the optimizer is unknown, or nothing remains.
        """
        if isinstance(share, bool) or not 0 < share <= 1:
            raise BudgetSyntaxError(
                f"a share of {share!r} of a device cannot be used; give one above 0 and up to 1, "
                f"such as {DEVICE_SHARE}"
            )
        free = available_bytes(device)
        limit = math.floor(Fraction(str(share)) * free)
        parts = {**bytes_beside(device, model, optimizer, batch), "other": reserved_bytes}
        reserved = sum(parts.values())
        if limit <= reserved:
            taken = ", ".join(f"{what} {format_bytes(x)}" for what, x in parts.items() if x)
            raise BudgetSyntaxError(
                f"{percent(share)} of the {format_bytes(free)} that {device or 'the device'} has "
                f"free leaves nothing{f' for a step beside {taken}' if taken else ''}; free some, "
                "or take a smaller model or batch"
            )
        return cls(bytes=limit, reserved_bytes=reserved)

    def resolve(self, store_all_bytes: int) -> int:
        """Turn the budget into bytes for one chain.

        Args:
            store_all_bytes: Peak of the step when everything is stored, in bytes.

        Returns:
            The bound in whole bytes, rounded down.
        """
        if self.bytes is not None:
            return self.bytes - self.reserved_bytes
        assert self.share is not None
        return math.floor(self.share * store_all_bytes)


def parse_budget(budget: int | float | str | Budget) -> Budget:
    """Read a budget.

    Args:
        budget: Bytes as a number, text with a unit ("512MiB" is 2**20 bytes each, "1.5 GB"
            10**9), a share of what storing everything needs ("40%"), a share of what a device has
            free now ("90% of the device", "80% of cuda:1"), or a `Budget`.

    Returns:
        The budget; fractions of a byte are rounded down.

    Raises:
        BudgetSyntaxError: Not a number, NaN, infinite, zero, negative or of unknown unit, or of a
            device that is not there.
    """
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, (str, float)) and not isinstance(budget, bool):
        with contextlib.suppress(TypeError):
            budget = operator.index(budget)  # numpy's integers, too
        if isinstance(budget, numbers.Real) and not isinstance(budget, int):
            budget = float(budget)  # numpy's floats of any size, and fractions
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise BudgetSyntaxError(
            f"a budget cannot be read from {type(budget).__name__} {budget!r}; {_REMEDY}"
        )
    if isinstance(budget, str):
        return _parse_text(budget)
    if isinstance(budget, float) and not math.isfinite(budget):
        raise BudgetSyntaxError(f"a budget of {budget} bytes is not a finite number; {_REMEDY}")
    if math.floor(budget) <= 0:
        hint = f"; if {percent(budget)} was meant, give {percent(budget)!r}" if budget > 0 else ""
        fault = "is less than one byte" if budget > 0 else "is not positive"
        raise BudgetSyntaxError(f"a budget of {budget} bytes {fault}{hint}; {_REMEDY}")
    return Budget(bytes=math.floor(budget))


def percent(share: float) -> str:
    """A share as text that `parse_budget` reads, such as "50%" for 0.5."""
    return f"{100 * share:.6g}%"


def meant_as_percentage(asked: int | float | str | Budget, size: int) -> str:
    """A question for people who may have forgotten a sign; empty where that is not likely.

    Args:
        asked: The budget as they gave it.
        size: What it is in bytes.
    """
    if isinstance(asked, Budget) or size > 100 or (isinstance(asked, str) and "%" in asked):
        return ""
    number = 0.0
    with contextlib.suppress(ValueError):
        number = float(asked)
    if number > 1 and number != size:  # nobody asks for half a byte
        gib, share = f"{number:.6g}GiB", percent(number)
        return (
            f"{size} bytes were asked for: if {number:.6g} GiB or {share} of what storing "
            f"everything needs was meant, give {gib!r} or {share!r}"
        )
    meant = percent(number) if isinstance(asked, float) and number <= 1 else f"{size}%"
    return f"{size} bytes were asked for: if {meant} was meant, give {meant!r}"


def is_of_device(budget: object) -> bool:
    """Whether a budget is text that depends on what a device has free when it is read."""
    match = _OF.match(budget) if isinstance(budget, str) else None
    return match is not None and match[2].lower() not in _EVERYTHING


def _parse_share_of(number: str, what: str) -> Budget:
    """A share of a device, or of storing everything."""
    if what.lower() in _EVERYTHING:
        return _parse_text(f"{number}%")
    try:
        share = float(number) / 100
    except ValueError:
        raise BudgetSyntaxError(f'the budget "{number}% of {what}" cannot be read') from None
    return Budget.device(what, share=share)


def _parse_text(text: str) -> Budget:
    if match := _OF.match(text):
        return _parse_share_of(*match.groups())
    match = _TEXT.match(text)
    if match is None:
        raise BudgetSyntaxError(f"the budget {text!r} cannot be read; {_REMEDY}")
    number, unit = match.groups()
    try:
        value = Fraction(number)
    except ValueError:
        raise BudgetSyntaxError(f"the budget {text!r} holds no number; {_REMEDY}") from None
    if unit == "%":
        if value <= 0:
            raise BudgetSyntaxError(f"the budget {text!r} is not positive; {_REMEDY}")
        return Budget(share=value / 100)
    if unit.lower() not in _UNITS:
        known = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, %"
        raise BudgetSyntaxError(
            f"the budget {text!r} has the unknown unit {unit!r} (known: {known}); {_REMEDY}"
        )
    size = math.floor(value * _UNITS[unit.lower()])
    if size <= 0 < value and not unit:
        meant = percent(float(value))
        raise BudgetSyntaxError(
            f"the budget {text!r} is less than one byte; if {meant} was meant, give {meant!r}; "
            + _REMEDY
        )
    if size <= 0:
        raise BudgetSyntaxError(f"the budget {text!r} is not positive; {_REMEDY}")
    return Budget(bytes=size)


def format_bytes(size: int, *, budget: bool = False) -> str:
    """Print bytes for people: three digits after the point, and the unit.

    Args:
        size: Bytes.
        budget: Whether the figure is a budget, rounded down; sizes are rounded up.

    Returns:
        Text such as "12.346 MiB", which `parse_budget` reads back.
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            thousandths = Fraction(size * 1000, scale)
            rounded = math.floor(thousandths) if budget else math.ceil(thousandths)
            whole, rest = divmod(abs(rounded), 1000)  # whole numbers: exact at any size
            return f"{'-' if rounded < 0 else ''}{whole}.{rest:03d} {unit}"
    return f"{size} B"


def exact_bytes(size: int, *, budget: bool = False) -> str:
    """Print bytes as `format_bytes` does, with the exact number where that rounds."""
    return f"{format_bytes(size, budget=budget)} ({size} bytes)" if size >= 1024 else f"{size} B"


def format_seconds(seconds: float) -> str:
    """Print seconds for people, with a unit that keeps three to six digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3f} {unit}"
    return f"{seconds / 1e-9:.3f} ns" if seconds else "0 s"
