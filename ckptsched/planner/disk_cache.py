"""Plans that took long, kept on disk between runs.

An entry is found by a digest of everything that decides a plan: the chain's fingerprint, the
budgets, the solver and its options, and this package's own source, so that no version reads
another's entries. It is not trusted: its schedule is simulated again, and an entry that is
damaged, or was asked for in other words, is removed and counts as missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..base.cache_folder import cache_folder, private_folder
from ..base.errors import PlanMismatchError, StorageError
from ..base.json_files import parse_json, read_regular, write_atomically
from .plan import Plan
from .plan_words import Workload

FORMAT = "ckptsched cached plan"
MOST_BYTES = 256 * 2**20
_ENTRY = re.compile(r"[0-9a-f]{64}\.json")
_DRAFT = re.compile(r"\.[0-9a-f]{64}\.json\.[0-9a-f]+\.draft")
SECONDS = "CKPTSCHED_CACHE_SECONDS"
"""The environment variable that says from how many seconds on a plan is kept."""
_WORTH_SECONDS = 0.1
_READ_SECONDS = 1e-5  # about what it takes to simulate an operation
_FORGOTTEN_SECONDS = 3600.0  # a draft this old belongs to a process that was killed


@final
@dataclass(frozen=True)
class PlanCache:
    """Plans in a folder: one file each, those that were not used for longest removed first."""

    folder: Path
    """Where they lie; made when the first plan is kept."""
    most_bytes: int = MOST_BYTES
    """How much they may take together, in bytes."""

    def find(self, request: Mapping[str, Any], chain: Workload) -> Plan | None:
        """The plan that was kept for a request, checked again; None where there is none.

        Args:
            request: What decides the plan, as JSON data; the same that `keep` was given.
            chain: What is planned.
        """
        path = self._path(request)
        try:
            text = read_regular(path)
        except OSError:
            return None
        try:
            plan = _read(parse_json(text), request, chain)
        except (PlanMismatchError, ValueError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used: others are removed before it
        return plan

    def keep(self, request: Mapping[str, Any], plan: Plan) -> None:
        """Keep a plan for a request; a folder that cannot be written keeps nothing.

        Args:
            request: What decides the plan, as JSON data.
            plan: The plan.
        """
        entry = {
            "format": FORMAT,
            "request": dict(request),
            "plan": plan.to_json(with_chain=False),
        }
        text = json.dumps(entry, allow_nan=False) + "\n"
        if len(text) > self.most_bytes:
            return
        if not private_folder(self.folder):
            return
        with contextlib.suppress(OSError):
            write_atomically(self._path(request), text)
            self._trim()

    def _path(self, request: Mapping[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True, separators=(",", ":"))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _trim(self) -> None:
        """Remove what was used least lately, until the rest is small enough."""
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process trims as well
                status = path.lstat()
                if _ENTRY.fullmatch(path.name):
                    entries.append((status.st_mtime_ns, status.st_size, path))
                age = time.time() - status.st_mtime
                if _DRAFT.fullmatch(path.name) and age > _FORGOTTEN_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def open_cache() -> PlanCache | None:
    """The cache of this user: in the platform's cache folder, or where `CKPTSCHED_CACHE` says.

    Returns:
        None where the variable is "off".
    """
    folder = cache_folder()
    return None if folder is None else PlanCache(folder / "plans")


def is_worth_keeping(seconds: float, operations: int) -> bool:
    """Whether plans took longer to find than to read back.

    Args:
        seconds: What they took.
        operations: Of their schedules, which are simulated when they are read.

    Raises:
        StorageError: `CKPTSCHED_CACHE_SECONDS` is no number.
    """
    asked = os.environ.get(SECONDS, "")
    try:
        least = float(asked) if asked else _WORTH_SECONDS
    except ValueError:
        raise StorageError(
            f"{SECONDS} is {asked!r}; it may be a number of seconds, such as 0.1, or unset"
        ) from None
    return seconds > least + _READ_SECONDS * operations


@functools.cache
def source_digest() -> str:
    """SHA-256 of this package's source: other code may plan otherwise."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(entry: Any, request: Mapping[str, Any], chain: Workload) -> Plan:
    """The plan of an entry.

    Raises:
        PlanMismatchError: It is damaged, or belongs to another request.
    """
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise PlanMismatchError("this is no entry of the cache")
    if entry.get("request") != dict(request):
        raise PlanMismatchError("the entry was made for another request")
    plan = Plan.from_json(entry.get("plan"), "the entry", chain=chain)
    if plan.budget_bytes != request.get("budget_bytes", plan.budget_bytes):
        raise PlanMismatchError("the entry was made for another budget")
    return plan
