"""The static picture: names of marks stay inside of the frame, whatever is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base import plot
from ckptsched.base.plot import Picture

POINTS = st.tuples(st.integers(1, 1000), st.floats(1, 3))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(POINTS, min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from(["sqrt", "every_stage", "input_only"]), POINTS), max_size=6),
)
def test_labels_are_inside_the_frame(
    plans: list[tuple[int, float]], baselines: list[tuple[str, tuple[int, float]]]
) -> None:
    figures: list[Any] = []
    make = plot._new_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_new_figure", lambda: figures.append(make()) or figures[-1])
        picture = Picture(title="x", plans=tuple(sorted(plans)), baselines=tuple(baselines))
        picture.draw(Path("/dev/null"))
    axes = figures[-1].axes[0]
    frame = axes.get_window_extent()
    assert len(axes.texts) == len(baselines)
    for text in axes.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1


def test_every_step_is_drawn(tmp_path: Path) -> None:
    figures: list[Any] = []
    make = plot._new_figure
    steps = ((10, 1.5), (20, 1.25), (25, 1.125), (40, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "_new_figure", lambda: figures.append(make()) or figures[-1])
        Picture(title="x", plans=(steps[0], steps[-1]), steps=steps).draw(tmp_path / "x.png")
    line = figures[-1].axes[0].lines[0]
    assert set(steps) <= set(zip(line.get_xdata(), line.get_ydata(), strict=True))
