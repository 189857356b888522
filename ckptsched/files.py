"""Files that appear whole or not at all, and JSON that people can read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part.

    Args:
        path: The file; its folder must exist.
        text: Its content.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:  # what people gave, not the draft
        error.filename, error.filename2 = str(target), None
        raise
    finally:
        draft.unlink(missing_ok=True)


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
