"""HiGHS without a word: nothing but answers goes to standard output."""

from __future__ import annotations

from typing import Any


def quiet_highs() -> Any:
    """A HiGHS solver that never prints.

    HiGHS 1.16 prints its banner while it is constructed, before an option could be set: as its
    Python class registers callbacks. The option is set there.

    Raises:
        ImportError: There is no highspy for this platform.
    """
    import highspy  # when it is needed: it takes a while

    class Quiet(highspy.Highs):
        def enableCallbacks(self) -> None:
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()  # type: ignore[no-untyped-call]

    solver: Any = Quiet()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)  # where no callbacks are registered
    return solver
