"""The user's cache folder: where plans and the counting allocator are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "CKPTSCHED_CACHE"
"""The environment variable that moves the cache, or turns it off: a path, or "off"."""


def cache_folder() -> Path | None:
    """The platform's folder for caches of ckptsched, or where `CKPTSCHED_CACHE` says.

    Returns:
        The folder, which need not exist; None where the variable is "off".
    """
    place = os.environ.get(VARIABLE, "")
    if place.strip().lower() == "off":
        return None
    return Path(place) if place else Path(platformdirs.user_cache_dir("ckptsched"))


def private_folder(folder: Path) -> bool:
    """Make a folder for the user alone, and say whether it is one.

    Args:
        folder: Where. What lies in a folder that others can write to is not to be trusted.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    ours = not hasattr(os, "getuid") or (
        status.st_uid == os.getuid() and not status.st_mode & 0o022
    )
    return ours and os.access(folder, os.W_OK)
