"""Draws bytes against seconds. matplotlib is an extra, imported when something is drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

from .errors import CkptschedError

Point: TypeAlias = tuple[int, float]
"""Bytes, and seconds as a multiple of those of storing everything."""

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_LOG_ABOVE = 4.0  # times store-all's seconds, from which a linear axis hides the cheaper plans
_HEADROOM = 1.6  # the plot ends at this many times the largest overhead of a plan

# Where the name of a mark may be, the best place first; offsets in points.
_PLACES: tuple[dict[str, Any], ...] = tuple(
    {"position": (x, y), "horizontalalignment": side, "verticalalignment": up, "rotation": turn}
    for x, y, side, up, turn in (
        (5, 0, "left", "center", 0),
        (-5, 0, "right", "center", 0),
        (3, 4, "left", "bottom", 0),
        (3, -4, "left", "top", 0),
        (-3, 4, "right", "bottom", 0),
        (-3, -4, "right", "top", 0),
        (3, 4, "left", "bottom", 50),
    )
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is drawn."""

    title: str
    """What it is of."""
    plans: tuple[Point, ...]
    """Projected: a point a budget, the least first; at least one."""
    steps: tuple[Point, ...] = ()
    """Every step of the front that is known, the least first; the plans are among them."""
    measured: tuple[Point, ...] = ()
    """Steps that were run."""
    baselines: tuple[tuple[str, Point], ...] = ()
    """Rules of thumb by name."""
    knee: Point | None = None
    """One of the plans, marked as the knee."""

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write the picture; the file's ending chooses the format, such as ".png".

        Raises:
            CkptschedError: matplotlib is not installed, or does not know the ending.
        """
        check_plot(path)
        figure = _new_figure()
        axes = figure.add_subplot()
        unit, scale = next((u, s) for u, s in _UNITS if self.plans[-1][0] >= s or s == 1)
        labels = self._draw_series(axes, scale)
        axes.set_title(f"Bytes against seconds: {self.title}")
        axes.set_xlabel(f"Peak of tensor bytes in a training step [{unit}]")
        axes.set_ylabel("Seconds of the step / seconds when everything is stored")
        axes.grid(alpha=0.3)
        legend = axes.legend()
        _place(figure, axes, labels, legend)
        figure.savefig(path, dpi=150)

    def _draw_series(self, axes: Any, scale: int) -> list[Any]:
        """Draw points and lines; returns the names of baselines, which are to be placed."""
        x, y = [size / scale for size, _ in self.plans], [ratio for _, ratio in self.plans]
        label = "our plan at each budget, projected"
        if self.steps:
            edge = [(max(self.plans[-1][0], self.steps[-1][0]), self.steps[-1][1])]
            known = [*self.steps, *edge]
            ends = [size / scale for size, _ in known]
            axes.step(ends, [ratio for _, ratio in known], where="post")
            axes.plot(x, y, "o", markersize=4, color="C0", label=label)
        else:
            axes.step(x, y, where="post", marker="o", markersize=4, label=label)
        if self.knee is not None:
            size, ratio = self.knee
            style = {"markersize": 11, "color": "tab:orange", "fillstyle": "none"}
            axes.plot(size / scale, ratio, "o", **style, label="knee")
        if self.measured:
            x, ratios = [size / scale for size, _ in self.measured], [r for _, r in self.measured]
            axes.plot(x, ratios, "x", color="tab:red", label="our plan, measured")
        # What is far dearer than any plan would flatten the plans: it goes to the upper edge.
        top = 1 + _HEADROOM * (max(*y, 1.1) - 1)
        label, labels = "baselines, projected", list[Any]()
        for name, (size, ratio) in self.baselines:
            point = (size / scale, min(ratio, top))
            text = name if ratio <= top else f"{name} ({ratio:.3g})"
            marker = "s" if ratio <= top else "^"
            axes.plot(*point, marker, color="tab:gray", markersize=5, label=label)
            offset = {"xytext": (0, 0), "textcoords": "offset points"}
            labels.append(axes.annotate(text, point, **offset, fontsize="small", in_layout=False))
            label = "_"  # matplotlib leaves such labels out of the legend
        axes.margins(0.08, 0.28)
        if max(y) > _LOG_ABOVE:
            axes.set_yscale("log")
        return labels


def _place(figure: Any, axes: Any, labels: list[Any], legend: Any) -> None:
    """Move names of marks to where they are inside of the frame, and hide no other, if they can."""
    figure.draw_without_rendering()  # which lays out the axes
    frame, taken = axes.get_window_extent(), [legend.get_window_extent()]
    for label in labels:
        boxes: list[tuple[bool, int, int, Any]] = []
        for place in _PLACES:
            label.set(**place)
            box = label.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            boxes.append((not inside, box.count_overlaps(taken), len(boxes), box))
        _, _, best, box = min(boxes, key=lambda x: x[:3])
        label.set(**_PLACES[best])
        taken.append(box)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Find out before a long run whether a plot can be drawn there.

    Args:
        path: As `Picture.draw` takes it.

    Raises:
        CkptschedError: matplotlib is not installed, or does not know the ending.
    """
    known = _new_figure().canvas.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending and ending not in known:
        raise CkptschedError(
            f"no plot can be drawn to {str(path)!r}: the ending '.{ending}' is unknown; give one "
            f"of {', '.join(sorted(known))}"
        )


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CkptschedError(
            f"plots need matplotlib ({error}); install it: pip install 'ckptsched[plot]'"
        ) from error
    # A figure of its own, without pyplot: nothing global changes, and no display is needed.
    return Figure(figsize=(8, 5), layout="constrained")
