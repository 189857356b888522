"""How commands answer: as text, or as data for programs, to a file or in the text's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..base.json_files import check_writable, render_json, write_atomically

if TYPE_CHECKING:
    from ..executor.verify import Verification
    from ..planner.plan import Plan
    from ..planner.plan_words import Workload

ALONE = "-"
"""The file that stands for standard output: data, and no text."""


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option that asks for data; given to the command as `data`, a path or None."""
    return click.option(
        "--json",
        "data",
        metavar="FILE",
        callback=_checked,
        help="Save the figures as data here; - prints them, and nothing else.",
    )(command)


def answer(
    say: Callable[[], object], facts: Callable[[], Mapping[str, Any]], data: str | None
) -> None:
    """Give an answer.

    Args:
        say: Prints it for people.
        facts: Gives the same as data.
        data: Where data goes to: a file besides, "-" for standard output in place of the text.
    """
    if data == ALONE:
        click.echo(render_json(facts()))
        return
    say()
    if data is not None:
        write_atomically(data, render_json(facts()) + "\n")
        click.echo(f"\ndata written to {data}")


def facts_of_plan(plan: Plan) -> dict[str, Any]:
    """The certificate of a plan: bytes are int, seconds and shares float."""
    return {
        "solver": plan.solver,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "least_budget_bytes": plan.least_budget_bytes,
        "store_all_bytes": plan.store_all_bytes,
        "seconds": plan.seconds,
        "lower_bound_seconds": plan.lower_bound_seconds,
        "schedule_class": plan.schedule_class,
        "gap": plan.gap,
        "overhead": plan.overhead,
        "forwards": plan.forwards,
        "stages": len(plan.chain),
    }


def facts_of_chain(chain: Workload, stored: Plan) -> dict[str, Any]:
    """What a profile has measured, and what the plan that stores all takes."""
    stages = [
        {
            "name": stage.name,
            "forward_seconds": stage.forward_seconds,
            "backward_seconds": stage.backward_seconds,
            "state_bytes": stage.state_bytes,
            "tape_bytes": stage.tape_bytes,
        }
        for stage in chain.stages
    ]
    return {"name": chain.name, "stages": stages, "store_all": facts_of_plan(stored)}


def facts_of_verification(found: Verification) -> dict[str, Any]:
    """What a step under a plan and a plain one gave, and whether the plan holds."""
    figures = asdict(found)
    del figures["timeline_bytes"]  # for pictures
    return {**figures, "ok": found.ok}


def _checked(ctx: click.Context, option: click.Parameter, path: str | None) -> str | None:
    if path != ALONE:
        check_writable(path)  # before a model is measured, which takes a while
    return path
