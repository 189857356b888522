"""The progress bar: after a second, where somebody looks, and never two of them."""

import io

import pytest
from rich.console import Console

from ckptsched.base import progress
from ckptsched.base import progress_bar as bar
from ckptsched.base.progress_bar import bar_of_solvers, progress_bar
from ckptsched.fitting.planning import plan
from tests.support.small_chains import mixed_chain


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_bar_shows_what_is_done_and_goes() -> None:
    console = terminal()
    with progress_bar(True, console=console, patience_seconds=0.0) as tell:
        tell("table of 500 stages", 0.25)
        tell("lower bound", 0.5)
    text = printed(console)
    assert "lower bound" in text
    assert "50%" in text
    assert text.endswith("\x1b[2K")  # the line is cleared


@pytest.mark.parametrize(("shown", "patience"), [(True, 60.0), (False, 0.0), (None, 0.0)])
def test_no_bar(shown: bool | None, patience: float) -> None:
    console = terminal()
    with progress_bar(shown, console=console, patience_seconds=patience) as tell:
        tell("work", 0.5)
    assert printed(console) == ""


def test_an_interrupted_bar_goes_as_well() -> None:
    console = terminal()

    def interrupted() -> None:
        with progress_bar(True, console=console, patience_seconds=0.0) as tell:
            tell("work", 0.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert printed(console).endswith("\x1b[2K")


def test_a_listener_hears_solvers_instead_of_a_bar() -> None:
    heard: list[tuple[str, float]] = []
    with progress.listening(lambda *said: heard.append(said)), bar_of_solvers(True):
        progress.report("work", 0.5)
    assert heard == [("work", 0.5)]


def test_planning_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(budget: int) -> None:
        progress.report("work", 0.5)

    monkeypatch.setattr(bar, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(
        "ckptsched.planner.solver_choice.Portfolio.answers",
        lambda self: [told(x) for x in self.sizes],
    )
    for shown in (True, False):
        with pytest.raises(AttributeError):  # nothing was planned
            plan(mixed_chain(), budget="50%", progress=shown)
        out, err = capsys.readouterr()
        assert not out
        assert ("work" in err) == shown
