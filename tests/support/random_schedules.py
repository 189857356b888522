"""Any valid schedule of a chain, not only those that solvers make."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from ckptsched.schedule.language import Schedule


@st.composite
def schedules(draw: st.DrawFn, stages: int, tapes_of: Sequence[int] = ()) -> Schedule:
    """A schedule that runs each stage once before the loss, and again as it likes.

    After the loss it makes some states beside their tapes, and tapes beside their states.

    Args:
        draw: Hypothesis.
        stages: Length of the chain.
        tapes_of: How many tapes each stage offers; one if not given.
    """
    words: list[str] = []
    states = {0}
    tapes: dict[int, bool] = {}  # whether each was made from the bare state
    coin = st.booleans()

    def forward(i: int, *, taped: bool) -> None:
        option = draw(st.integers(0, tapes_of[i - 1] - 1)) if taped and tapes_of else 0
        words.append(f"{'T' if taped else 'F'}{i}" + (f".{option}" if option else ""))
        if taped:
            tapes[i] = i - 1 in states
        else:
            states.add(i)

    def drop_some(last: int) -> None:
        """Drop what is not needed: the copy of a state that a tape was not made from."""
        for i in sorted(states | set(tapes)):
            if 0 < i != last and i in states and tapes.get(i + 1) is not True and draw(coin):
                drop_state(i)
            if 0 < i != last and i in tapes and tapes.get(i + 1) is not False and draw(coin):
                words.append(f"-t{i}")
                del tapes[i]

    def drop_state(i: int) -> None:
        words.append(f"-x{i}")
        states.remove(i)

    def double_some(last: int) -> None:
        """Make a second copy of states that are there."""
        for i in range(1, last + 1):
            there = i - 1 in states or i - 1 in tapes
            if there and (i in states) != (i in tapes) and draw(coin) and draw(coin):
                forward(i, taped=i in states)

    for i in range(1, stages + 1):
        forward(i, taped=draw(coin))
        drop_some(i)
    words.append("turn")
    for i in reversed(range(1, stages + 1)):
        double_some(i)
        drop_some(-1)
        if i not in tapes:
            start = max(j for j in states | set(tapes) if j < i)
            for j in range(start + 1, i):
                forward(j, taped=draw(coin))
                drop_some(j)
            forward(i, taped=True)
        words.append(f"B{i}")
        del tapes[i]
        if i in states:
            drop_state(i)
    words.append("-x0")
    return Schedule.from_text(" ".join(words))
