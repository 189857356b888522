"""A progress bar on stderr, for what turns out to take long."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from . import progress
from .progress import Listener

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE_SECONDS = 1.0  # before a bar is shown
LINE_SECONDS = 2.0, 10.0  # before the first line where there is no terminal, and between lines
lines_where_piped = False
"""Whether lines are written now and then where stderr is no terminal: the command line's choice."""


@contextmanager
def progress_bar(
    shown: bool | None = None,
    *,
    console: Console | None = None,
    patience_seconds: float | None = None,
) -> Iterator[Listener]:
    """A bar that appears once something has taken more than a second, and goes at its end.

    Args:
        shown: Whether to show it at all; None shows it if stderr is a terminal.
        console: Where; standard error by default.
        patience_seconds: How long nothing is shown; a second by default.

    Returns:
        What moves it on: called with what is being done and the share of it that is done.
    """
    stream = console.file if console else sys.stderr
    visible = stream.isatty() if shown is None else shown
    if not visible:
        yield _lines(stream) if lines_where_piped and shown is None else lambda what, share: None
        return
    state = random.getstate()
    from rich.console import Console  # when it is needed: it takes a while
    from rich.progress import Progress

    random.setstate(state)  # from which rich has drawn as it was imported

    console = console or Console(stderr=True)
    patience = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    # In a file nothing can be taken away again: there the last state alone is written.
    bar = Progress(console=console, transient=console.is_terminal)
    task = bar.add_task("", total=1.0)
    begun = time.perf_counter()
    doing = ""

    def tell(what: str, share: float) -> None:
        nonlocal doing
        if what != doing:  # what remains is guessed from the speed of this alone
            doing = what
            bar.reset(task, description=what)
        bar.update(task, completed=share)
        if time.perf_counter() - begun >= patience:
            bar.start()

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()


def _lines(stream: IO[str]) -> Listener:
    """Writes a line now and then, for who reads a log."""
    due = time.perf_counter() + LINE_SECONDS[0]

    def tell(what: str, share: float) -> None:
        nonlocal due
        if time.perf_counter() >= due:
            due = time.perf_counter() + LINE_SECONDS[1]
            print(f"{what}: {share:.0%}", file=stream, flush=True)

    return tell


@contextmanager
def bar_of_solvers(shown: bool | None = None) -> Iterator[None]:
    """A bar for what solvers report meanwhile; none of its own where somebody listens already.

    Args:
        shown: As `progress_bar` takes it.
    """
    if progress.is_heard():
        yield
        return
    with progress_bar(shown) as tell, progress.listening(tell):
        yield
