"""`Forecast`: whether a training fits a device, in a table, by kind of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ...base.budget import format_bytes, format_seconds
from ...base.text_table import Grid
from ...planner.plan import Plan
from ...simulator.lifetimes import Role, lifetimes

_STEP = {
    "gradients": (Role.PARAMETERS,),
    "activations": (Role.STATE, Role.TAPE, Role.RANDOM, Role.BUFFERS, Role.KEPT),
    "gradients of activations": (Role.GRADIENT,),
    "output and loss": (Role.OUTPUT,),
}
_NOT_COUNTED = (
    "not counted: workspaces of kernels, the allocator's rounding and gaps, the context of the "
    "device, and what an optimizer takes while it steps"
)


@final
@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a training will take of a device, without a run: bytes from shapes alone."""

    model: str
    """Name of the model's class."""
    device: str
    """Name of the device; empty where only its memory was given."""
    memory_bytes: int
    """What may be used on one device."""
    setting: str
    """Optimizer, dtype and devices, in words."""
    kept_bytes: Mapping[str, int]
    """What lies on one device before a step, by kind."""
    store_all: Plan
    """The step of plain autograd, which stores everything."""
    plan: Plan | None
    """The cheapest step found that fits; None where nothing fits."""
    least_bytes: int
    """The least whole with which a plan works, what is kept included."""
    timed: bool
    """Whether seconds follow from figures of a device; else only their ratios are meant."""
    whole: str
    """What of the model is one stage though it could be several, and why: plans are coarse there.
    Empty where there is nothing of the kind."""
    largest: Mapping[str, int]
    """The largest "batch" and "sequence" with which a plan fits, where they were asked for; 0 where
    not even 1 fits."""

    @property
    def plain_bytes(self) -> int:
        """What plain autograd takes at its peak, all in all."""
        return sum(self.kept_bytes.values()) + self.store_all.peak_bytes

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all parameters, which are there when the backward has ended."""
        return sum(stage.parameter_gradient_bytes for stage in self.store_all.chain.stages)

    @property
    def fits(self) -> bool:
        """Whether plain autograd fits."""
        return self.plain_bytes <= self.memory_bytes

    @property
    def fits_with_plan(self) -> bool:
        """Whether a plan fits."""
        return self.plan is not None

    @property
    def spare_bytes(self) -> int:
        """What plain autograd leaves of the device; negative is what it lacks."""
        return self.memory_bytes - self.plain_bytes

    @property
    def seconds(self) -> float:
        """An estimate of a step of plain autograd, at the device's peak rates."""
        return self.store_all.seconds

    def rows(self) -> dict[str, tuple[int, int | None]]:
        """Bytes at the peak by kind: of plain autograd, and of the plan (None without one)."""
        plain = self._at_peak(self.store_all)
        planned = self._at_peak(self.plan) if self.plan is not None else {}
        found = {key: (plain[key], planned.get(key)) for key in plain}
        found["all"] = (sum(plain.values()), sum(planned.values()) if planned else None)
        return found

    def _at_peak(self, plan: Plan) -> dict[str, int]:
        """What is live at the peak of a step, by kind."""
        timeline = plan.trace.timeline
        found = lifetimes(plan.chain, plan.schedule, timeline)
        at = int(timeline.argmax())
        by_role = found.bytes_by_role()[:, at]
        step = {name: sum(int(by_role[role]) for role in roles) for name, roles in _STEP.items()}
        return {**self.kept_bytes, **step, "transient": int(found.transient[at])}

    def _grid(self) -> Grid:
        cells = [
            (name, format_bytes(plain), "-" if planned is None else format_bytes(planned))
            for name, (plain, planned) in self.rows().items()
        ]
        return Grid(
            title=self.headline(),
            headings=("bytes at the peak", "plain autograd", "planned"),
            rows=tuple(cells),
            names_first=True,
        )

    def headline(self) -> str:
        """The answer in a sentence."""
        whole = format_bytes(self.memory_bytes)
        where = f"{self.device} ({whole} of it)" if self.device else whole
        if self.fits:
            return f"{self.model} fits {where}: {format_bytes(self.spare_bytes)} to spare"
        lacking = f"{self.model} does not fit {where}: {format_bytes(-self.spare_bytes)} too much"
        if self.plan is None:
            return (
                f"{lacking}, and no plan fits: the least takes {format_bytes(self.least_bytes)} "
                "all in all"
            )
        return f"{lacking}; with a plan it does, for {self.plan.overhead:+.1%} of time"

    def _lines(self) -> list[str]:
        """What stands below the table."""
        lines = [f"gradients when the backward has ended: {format_bytes(self.gradient_bytes)}"]
        if self.timed:
            plan = self.plan
            planned = "" if plan is None else f", {format_seconds(plan.seconds)} planned"
            lines.append(
                f"estimated: a step takes {format_seconds(self.seconds)}{planned}, at the peak "
                "rates of the data sheet, of which kernels reach a share"
            )
        lines.append(f"least with which a plan works: {format_bytes(self.least_bytes)} all in all")
        lines += [f"largest {what} that fits with a plan: {n}" for what, n in self.largest.items()]
        if self.whole:
            lines.append(f"one stage, so that plans are coarse: {self.whole}")
        return [*lines, _NOT_COUNTED]

    def __str__(self) -> str:
        """For people."""
        return "\n".join([self.headline(), self.setting, "", str(self._grid()), "", *self._lines()])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return self._grid().to_html()

    def to_json(self) -> dict[str, Any]:
        """The figures as data: bytes are int, seconds float."""
        rows = self.rows()
        return {
            "model": self.model,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "setting": self.setting,
            "fits": self.fits,
            "fits_with_plan": self.fits_with_plan,
            "spare_bytes": self.spare_bytes,
            "least_bytes": self.least_bytes,
            "gradient_bytes": self.gradient_bytes,
            "plain_bytes": {name: plain for name, (plain, _) in rows.items()},
            "planned_bytes": {name: planned for name, (_, planned) in rows.items()}
            if self.plan is not None
            else None,
            "overhead": None if self.plan is None else self.plan.overhead,
            "estimated_seconds": self.seconds if self.timed else None,
            "planned_seconds": self.plan.seconds if self.plan is not None and self.timed else None,
            "whole": self.whole,
            "largest": dict(self.largest),
        }
