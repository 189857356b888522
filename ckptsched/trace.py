"""One line of an account of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Live:
    """Something that takes bytes at one moment of a step."""

    name: str
    """What it is, such as "tape[3]"."""
    bytes: int
    """Its bytes on the device."""
