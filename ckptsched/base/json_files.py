"""Files that appear whole or not at all, sealed by a checksum, and JSON that people can read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CkptschedError

_LONG = 128  # bytes; file systems take names of 255
_DEEPEST = 64  # of lists and objects inside each other; ours are 6 deep
# Characters that do something to a terminal: controls, line separators, changes of direction, and
# halves of characters, which cannot be written.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Of several threads and processes that write it at once, one is the last. The draft beside it
    has a name that nobody can guess, and is never an existing file or link.

    Args:
        path: The file; its folder must exist. A link is replaced, not followed.
        content: What it is to hold; text goes in as UTF-8.

    Raises:
        OSError: It cannot be written, or is there and no file (a pipe, a device, a folder).
    """
    target = Path(path)
    # Where the file's name is long, that of the draft goes without it: it is to be short enough.
    name = target.name if len(target.name.encode(errors="replace")) <= _LONG else ""
    draft = target.parent / f".{name}.{secrets.token_hex(8)}.draft"
    try:
        mode = _mode_of(target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(draft, flags, 0o666), "wb") as file:
            if mode is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # of file systems that have no modes
                    os.fchmod(file.fileno(), mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:  # what people gave, not the draft
        error.filename, error.filename2 = str(target), None
        raise
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str] | None) -> None:
    """Find out before a long run whether a file can be written.

    Args:
        path: The file; None for none.

    Raises:
        CkptschedError: Its folder is missing, or may not be written to.
    """
    if path is None:
        return
    folder = Path(path).parent
    fault = ""
    if not folder.is_dir():
        fault = f"there is no folder {str(folder)!r}; make it"
    elif not os.access(folder, os.W_OK | os.X_OK):
        fault = f"the folder {str(folder)!r} may not be written to; allow it"
    if fault:
        raise CkptschedError(f"{str(path)!r} cannot be written: {fault}, or give another path")


def _mode_of(target: Path) -> int | None:
    """The permissions of a file that is to be replaced; None where there is none."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return None
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "it is there and no regular file", str(target))
    return stat.S_IMODE(mode)


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Read a file of our own: no link, no pipe that might never end, not another user's.

    Args:
        path: The file.

    Raises:
        OSError: There is none, or something else is in its place.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
        if not stat.S_ISREG(status.st_mode) or not ours:
            raise PermissionError(errno.EPERM, "it is no regular file of this user", str(path))
        return file.read()


def read_json(path: str | os.PathLike[str], error: type[CkptschedError], advice: str) -> Any:
    """Read a JSON file that people name.

    Args:
        path: The file.
        error: What to raise.
        advice: What to do where the file cannot be read, for the message.

    Raises:
        CkptschedError: Of that type: no such file, a pipe or device, not JSON, numbers that JSON
            has not, or nested absurdly.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe may wait, a device never end
            raise error(
                f"{str(path)!r} cannot be read: it is no file but a pipe or device; {advice}"
            )
        return parse_json(Path(path).read_bytes())
    except OSError as reason:
        raise error(f"{str(path)!r} cannot be read: {reason.strerror or reason}; {advice}") from (
            reason
        )
    except ValueError as reason:
        raise error(f"{str(path)!r} is damaged: it is not JSON ({reason}); {advice}") from reason


def parse_json(text: bytes | str) -> Any:
    """The data of a JSON text, fit to be shown to people.

    Raises:
        ValueError: It is none, holds NaN, Infinity or control characters, or is nested absurdly.
    """
    try:
        data = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    ahead: list[tuple[Any, int]] = [(data, 0)]
    while ahead:
        value, depth = ahead.pop()
        if isinstance(value, str):
            if found := _CONTROL.search(value):
                raise ValueError(f"a text in it has the control character {found[0]!r}")
        elif isinstance(value, (dict, list)):
            if depth > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            inside = (*value, *value.values()) if isinstance(value, dict) else value
            ahead += [(x, depth + 1) for x in inside if not isinstance(x, (int, float))]
    return data


def printable(text: str) -> str:
    """A text with control characters as escapes: an escape character as "x1b" after a backslash."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def render_json(data: Any, depth: int = 0) -> str:
    """JSON text for people: mappings and lists of mappings in lines, columns in one line."""
    pad = " " * (depth + 1)
    if isinstance(data, dict) and data and depth < 3:
        rows = (f"{pad}{json.dumps(k)}: {render_json(v, depth + 1)}" for k, v in data.items())
        return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        rows = (pad + json.dumps(item, allow_nan=False) for item in data)
        return "[\n" + ",\n".join(rows) + "\n" + " " * depth + "]"
    return json.dumps(data, allow_nan=False)


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of all but the entry "checksum", however the file is laid out."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum, and control characters in its texts as escapes.

    Those of other people's texts, such as names of modules; files with others are not read.
    """
    shown = {key: _shown(value) for key, value in content.items()}
    return {**shown, "checksum": checksum(shown)}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key): _shown(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)) and not all(isinstance(x, (int, float)) for x in value):
        return [_shown(part) for part in value]
    return value


def fault_of_seal(content: Mapping[str, Any]) -> str:
    """What is wrong with the checksum of some content, in words; empty where it is right."""
    says, has = content.get("checksum"), checksum(content)
    return "" if says == has else f"it says checksum {says!r}, its content has {has!r}"
