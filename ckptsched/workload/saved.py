"""What is kept as JSON: written with a checksum, and read again only as it was written."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ..base.errors import WorkloadError
from ..base.json_files import fault_of_seal, read_json, sealed, write_atomically
from .stage import Stage, check_size, check_time

WRITES_ONE = "`ckptsched profile MODEL -o FILE` writes a chain, `ckptsched plan` a plan"
"""What to do where a file cannot be read."""
FOR_PEOPLE = ("name", "layouts")
"""Keys of what neither planning nor executing depends on."""


@dataclass(frozen=True, kw_only=True)
class Saved(abc.ABC):
    """A chain or a graph as data, and the figures that both have of the whole."""

    stages: tuple[Stage, ...]
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
    name: str = ""
    """Name for people."""

    kind: ClassVar[str]
    """What it is called in messages."""
    needs: ClassVar[str]
    """What its data must have, for the message where they have not."""

    def __len__(self) -> int:
        """The number of stages n."""
        return len(self.stages)

    def _check_whole(self) -> None:
        """Refuse figures of the whole that are out of range."""
        for figure in FIGURES:
            if figure.endswith("_bytes"):
                check_size(f"the {self.kind}'s {figure}", getattr(self, figure))
        check_time("the loss", self.loss_seconds)

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of it as JSON data, in bytes and seconds."""

    @classmethod
    @abc.abstractmethod
    def _read(cls, data: Mapping[str, Any]) -> Self:
        """Read `to_json`'s data; may fail in any way where they are others."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` gives.

        Args:
            data: Its keys; in a chain `size_unit` and `time_unit` may name others than bytes
                and seconds, and what is not of the planning model may be left out.

        Raises:
            WorkloadError: Missing keys, wrong lengths, impossible values, unknown units, a node
                that reads a later one.
        """
        try:
            return cls._read(data)
        except WorkloadError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise WorkloadError(
                f"this is not a {cls.kind} ({type(error).__name__}: {error}); it needs {cls.needs}"
            ) from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that planning and executing depend on."""
        data = self.to_json()
        for key in FOR_PEOPLE:
            data.pop(key, None)
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, with a checksum; it appears whole or not at all."""
        write_atomically(path, json.dumps(sealed(self.to_json())) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file: one that `save` wrote, or one written by hand.

        Raises:
            WorkloadError: The file is missing, is not JSON, holds something else, or was changed
                after it was saved.
        """
        return cls.from_saved(read_json(path, WorkloadError, WRITES_ONE), repr(str(path)))

    @classmethod
    def from_saved(cls, data: Any, source: str) -> Self:
        """Read the data of a file, and check that it was not changed; `source` is for messages.

        Without a checksum they are figures of somebody's own, which no model may be run by. A
        WorkloadError where they are something else, or were changed after they were saved.
        """
        if not isinstance(data, dict):
            raise WorkloadError(f"{source} holds {type(data).__name__}, not a {cls.kind}")
        measured = data.get("signature") is not None
        if (measured or "checksum" in data) and (fault := fault_of_seal(data)):
            raise WorkloadError(
                f"{source} was changed after it was saved: {fault}; restore the file or make it "
                "anew. Figures of your own are read without checksum and signature"
            )
        try:
            return cls.from_json(data)
        except WorkloadError as error:
            raise WorkloadError(f"{source}: {error}") from error


FIGURES = tuple(field.name for field in fields(Saved) if field.name != "stages")
"""What chains and graphs have of the whole."""
