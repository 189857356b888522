"""Any valid schedule of a chain, not only those that solvers make."""

from __future__ import annotations

from hypothesis import strategies as st

from ckptsched.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn, stages: int) -> Schedule:
    """A schedule that runs each stage once before the loss, and again as it likes.

    Args:
        draw: Hypothesis.
        stages: Length of the chain.
    """
    words: list[str] = []
    states, tapes = {0}, set[int]()
    coin = st.booleans()

    def forward(i: int, *, taped: bool) -> None:
        words.append(f"{'T' if taped else 'F'}{i}")
        (tapes if taped else states).add(i)

    def drop_some(last: int) -> None:
        """Drop what is not needed, where a tape does not hold on to it."""
        for i in sorted(states | tapes):
            if 0 < i != last and i + 1 not in tapes and draw(coin):
                drop(i)

    def drop(i: int) -> None:
        words.extend([f"-x{i}"] * (i in states) + [f"-t{i}"] * (i in tapes))
        states.discard(i)
        tapes.discard(i)

    for i in range(1, stages + 1):
        forward(i, taped=draw(coin))
        drop_some(i)
    words.append("turn")
    for i in reversed(range(1, stages + 1)):
        drop_some(-1)
        if i not in tapes:
            start = max(j for j in states | tapes if j < i)
            for j in range(start + 1, i):
                forward(j, taped=draw(coin))
                drop_some(j)
            forward(i, taped=True)
        words.append(f"B{i}")
        tapes.discard(i)
        if i in states:
            drop(i)
    words.append("-x0")
    return Schedule.from_text(" ".join(words))
