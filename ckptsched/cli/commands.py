"""The commands: ckptsched profile, plan, largest, fit, report, show, verify, completion."""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING, Any, final

import click
from click.shell_completion import get_completion_class

from ..base import progress_bar
from ..base.errors import CkptschedError
from ..base.json_files import check_writable, printable, render_json
from .answers import (
    ALONE,
    answer,
    facts_of_chain,
    facts_of_plan,
    facts_of_verification,
    json_option,
)
from .options import (
    fit_options,
    is_file,
    model_options,
    plan_options,
    profile_target,
    read_file,
    read_or_profile,
    runnable_target,
)

if TYPE_CHECKING:
    from ..executor.verify import Verification
    from ..planner.plan import Plan
    from ..planner.plan_words import Workload
    from ..planner.planner import PlanOptions
    from .targets import Inputs

# Commands import what they need when they run: --help waits for nothing, and who plans a saved
# chain does not wait for torch.

_BUDGET_HELP = 'Bytes, or text such as "64MiB", "1.5 GB" or "40%" of what storing everything needs.'
_FAKE_HELP = "Estimate the MODEL on tensors without data: for planning only, seconds are guesses."
_HTML_HELP = "Write a page here, to explore it in a browser."
_ROUNDS_HELP = "How often to time a step under the plan and one of plain autograd, in turn."
_MOST_HELP = "Try no larger batch, or no more steps (1000 where nothing is said)."
_OVERHEAD_HELP = 'What recomputation may cost, such as "10%" of the time of storing everything.'


@final
class _Failure(click.ClickException):
    """What was asked cannot be done: one line on stderr."""

    exit_code = 2


@final
class _Group(click.Group):
    """Turns errors into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except CkptschedError as error:
            raise _Failure(printable(" ".join(str(error).split()))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader such as `head` has enough: end quietly
                raise
            place = f": {str(error.filename)!r}" if error.filename else ""
            raise _Failure(f"{error.strerror or error}{place}") from error


def example(line: str) -> str:
    """The end of a command's help: a line that runs."""
    return f"\b\nExample:\n  {line}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    # The package imports its modules, never the other way round; it is there when this runs.
    getattr(sys.modules[__name__.partition(".")[0]], "__version__", "unknown"),
    prog_name="ckptsched",
)
def main() -> None:
    r"""Fit PyTorch training into a byte budget.

    A MODEL is module:callable, found from the current folder, such as
    models.resnet:ode_resnet18; a saved chain may stand in its place where nothing is run.

    \b
    Exit codes: 0  done
                1  no: a step broke its budget or changed a gradient, nothing fits
                2  what was asked cannot be done; one line on stderr says why
    """
    progress_bar.lines_where_piped = True
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of stages may be in any script
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command(
    "profile",
    epilog=example("ckptsched profile models.mlp:deep_mlp --input 512x16 -o chain.json"),
)
@click.argument("model")
@model_options
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the chain here.")
@json_option
def profile_command(
    model: str, inputs: Inputs, fake: bool, output: str | None, data: str | None
) -> None:
    """Measure seconds and bytes of every stage of a MODEL."""
    from ..planner.planner import plan_one
    from ..report.report import make_console, print_chain

    check_writable(output)
    target = runnable_target(model, inputs, "profile")
    chain = profile_target(model, target, fake=fake)
    if output is not None:
        chain.save(output)
    stored = plan_one(chain, "100%")

    def say() -> None:
        print_chain(chain, make_console(), stored)
        if output is not None:
            click.echo(f"\nchain written to {output}")

    answer(say, lambda: facts_of_chain(chain, stored), data)


@main.command("plan", epilog=example("ckptsched plan chain.json --budget 60% -o plan.json"))
@click.argument("model", metavar="MODEL|CHAIN")
@model_options
@plan_options
@click.option("--budget", help=_BUDGET_HELP)
@click.option("--overhead", help=f"Instead of a budget: find the least. {_OVERHEAD_HELP}")
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan here.")
@json_option
def plan_command(
    model: str,
    inputs: Inputs,
    budget: str | None,
    overhead: str | None,
    fake: bool,
    options: PlanOptions,
    output: str | None,
    data: str | None,
) -> None:
    """Find the schedule that takes least time within a budget.

    With --overhead: find the least budget in which recomputation costs no more than that.
    """
    from ..planner.planner import plan_one

    if (budget is None) == (overhead is None):
        raise click.UsageError("give --budget or --overhead, one of the two")
    check_writable(output)
    chain = read_or_profile(model, inputs, fake=fake)
    if budget is not None:
        plan = plan_one(chain, budget, **options)
    else:
        from ..fitting.largest_that_fits import least_budget

        plan = least_budget(chain, overhead=overhead or "", **options)
    if output is not None:
        plan.save(output)
    answer(lambda: _say(plan, output), lambda: facts_of_plan(plan), data)


def _say(found: object, plan_file: str | None) -> None:
    click.echo(str(found))
    if plan_file is not None:
        click.echo(f"\nplan written to {plan_file}")


@main.command("largest", epilog=example("ckptsched largest chain.json --budget 64MiB"))
@click.argument("model", metavar="MODEL|CHAIN")
@model_options
@plan_options
@click.option("--budget", required=True, help=_BUDGET_HELP)
@click.option("--overhead", help=_OVERHEAD_HELP)
@click.option("--steps", is_flag=True, help="Ask for steps of an ODE block, not for the batch.")
@click.option("--most", type=click.IntRange(min=1), help=_MOST_HELP)
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan here.")
@json_option
def largest_command(
    model: str,
    inputs: Inputs,
    budget: str,
    overhead: str | None,
    steps: bool,
    most: int | None,
    fake: bool,
    options: PlanOptions,
    output: str | None,
    data: str | None,
) -> None:
    """Find the largest batch that can be trained in a budget, or the most steps.

    A MODEL is profiled with several batches; the first length of --input is replaced. A CHAIN,
    and steps, are scaled from what was measured. Without --overhead, steps often end at --most.
    """
    from ..fitting.largest_that_fits import largest_batch, largest_steps
    from .targets import sample_input

    check_writable(output)
    asked: dict[str, Any] = {"budget": budget, "overhead": overhead, **options}
    if most is not None:
        asked["most"] = most
    if steps:
        found = largest_steps(read_or_profile(model, inputs, fake=fake), **asked)
    elif is_file(model):
        found = largest_batch(read_or_profile(model, inputs, fake=fake), **asked)
    else:
        target = runnable_target(model, inputs, "largest")
        rest = (inputs.shape or "").partition("x")

        def make(batch: int) -> Any:
            return sample_input(f"{batch}{rest[1]}{rest[2]}", inputs.dtype, inputs.device)

        found = largest_batch(target.model, make, fake=fake, **asked)
    if output is not None:
        found.plan.save(output)

    def facts() -> dict[str, Any]:
        plan = facts_of_plan(found.plan)
        return {"size": found.size, "why_no_more": found.why_no_more, "plan": plan}

    answer(lambda: _say(found, output), facts, data)


@main.command("fit", epilog=example("ckptsched fit models.mlp:deep_mlp --input 512x16 --device T4"))
@click.argument("model")
@plan_options
@fit_options
@json_option
def fit_command(
    model: str,
    texts: tuple[str, ...],
    arguments: Any,
    data: str | None,
    asked: dict[str, Any],
) -> None:
    """Tell whether training a MODEL fits a device, from shapes alone: nothing is run.

    The exit code is 1 where it does not fit, with no plan either.
    """
    from ..fitting.before_a_run.asking import will_it_fit
    from .targets import inputs_without_data, load_without_data

    taken, named = inputs_without_data(texts)
    found = will_it_fit(load_without_data(model, arguments), *taken, kwargs=named, **asked)
    answer(lambda: click.echo(str(found)), found.to_json, data)
    if not found.fits_with_plan:
        raise SystemExit(1)


@main.command(
    "report", epilog=example("ckptsched report chain.json --budgets 6 --html tradeoff.html")
)
@click.argument("model", metavar="MODEL|CHAIN")
@model_options
@plan_options
@click.option(
    "--budgets",
    type=click.IntRange(min=2),
    default=10,
    show_default=True,
    help="How many budgets, from the least that works to storing everything.",
)
@click.option(
    "--budget", multiple=True, help=f"A budget besides, left out if nothing fits. {_BUDGET_HELP}"
)
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("--measure", is_flag=True, help="Run a training step under every plan.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help=_ROUNDS_HELP)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the trade-off here.")
@json_option
@click.option("--html", "page", type=click.Path(dir_okay=False), help=_HTML_HELP)
@click.pass_context
def report_command(
    ctx: click.Context,
    model: str,
    inputs: Inputs,
    budgets: int,
    budget: tuple[str, ...],
    fake: bool,
    measure: bool,
    rounds: int,
    options: PlanOptions,
    plot: str | None,
    data: str | None,
    page: str | None,
) -> None:
    """Print the trade-off between bytes and seconds, beside the usual rules of thumb.

    With --measure the exit code is 1 where a step broke its budget or changed a gradient.
    """
    from ..report.report import Outputs, make_console, report

    outputs = Outputs(plot=plot, json=None if data == ALONE else data, html=page)
    console = make_console(silent=data == ALONE)
    outputs.check()  # before the model is measured, which takes a while
    if fake and measure:
        raise click.UsageError("--fake runs nothing, --measure runs every plan: give one of them")
    if not measure:
        chain = read_or_profile(model, inputs, fake=fake)
        found = report(chain, budgets, also=budget, outputs=outputs, console=console, **options)
        if data == ALONE:
            click.echo(render_json(found.to_json()))
        return
    from ..executor.verify import verify as run_verify

    target = runnable_target(model, inputs, "--measure")

    def run(plan: Plan) -> Verification:
        timeline = page is not None
        return run_verify(target.model, plan, target.sample, rounds=rounds, timeline=timeline)

    chain = profile_target(model, target)
    found = report(
        *(chain, budgets), also=budget, measure=run, outputs=outputs, console=console, **options
    )
    if data == ALONE:
        click.echo(render_json(found.to_json()))
    if any(row.measured is not None and not row.measured.ok for row in found.rows):
        ctx.exit(1)


@main.command("show", epilog=example("ckptsched show plan.json --explain"))
@click.argument("file", metavar="CHAIN|GRAPH|PLAN")
@click.option("--timeline", "picture", is_flag=True, help="Draw the bytes over the operations.")
@click.option("--operations", is_flag=True, help="Print the schedule.")
@click.option("--explain", is_flag=True, help="Say why: what binds, what other budgets would buy.")
@click.option("--html", "page", type=click.Path(dir_okay=False), help=_HTML_HELP)
@json_option
@plan_options
def show_command(
    file: str,
    picture: bool,
    operations: bool,
    explain: bool,
    page: str | None,
    data: str | None,
    options: PlanOptions,
) -> None:
    """Print what a saved chain, graph or plan holds; of a chain, the plan that stores all."""
    from ..planner.plan import Plan
    from ..planner.planner import plan_one

    check_writable(page)
    found = read_file(file)
    plan = found if isinstance(found, Plan) else plan_one(found, "100%", **options)

    def facts() -> dict[str, Any]:
        return facts_of_plan(plan) if isinstance(found, Plan) else facts_of_chain(found, plan)

    def say() -> None:
        _show(found, plan, picture=picture, operations=operations, explain=explain, options=options)

    answer(say, facts, data)
    if page is not None:
        plan.to_html(page)
        if data != ALONE:
            click.echo(f"\npage written to {page}")


def _show(
    found: Workload | Plan,
    plan: Plan,
    *,
    picture: bool,
    operations: bool,
    explain: bool,
    options: PlanOptions,
) -> None:
    from ..planner.explanation import explain_plan
    from ..report.report import make_console, print_chain, timeline
    from ..workload.graph import Graph

    if found is plan:
        click.echo(str(plan))
    else:
        print_chain(plan.chain, make_console(), plan)
    if explain:
        click.echo("\n" + str(explain_plan(plan, **options)))
    if picture:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        ascii_only = not encoding.lower().startswith("utf")
        click.echo("\n" + timeline(plan, ascii_only=ascii_only))
    if operations:
        named = plan.chain.schedule_text if isinstance(plan.chain, Graph) else None
        click.echo("\n" + (named(plan.schedule) if named else plan.schedule.to_text()))


@main.command(
    "verify",
    epilog=example(
        "ckptsched verify models.mlp:deep_mlp --input 512x16 --budget 70% --html measured.html"
    ),
)
@click.argument("model")
@click.argument("plan_file", metavar="[PLAN]", required=False)
@model_options
@click.option("--budget", help=f"Plan for this budget, where no PLAN is given. {_BUDGET_HELP}")
@click.option("--rounds", type=click.IntRange(min=0), default=3, help=_ROUNDS_HELP)
@click.option("--html", "page", type=click.Path(dir_okay=False), help=_HTML_HELP)
@json_option
@click.pass_context
def verify_command(
    ctx: click.Context,
    model: str,
    plan_file: str | None,
    inputs: Inputs,
    budget: str | None,
    rounds: int,
    page: str | None,
    data: str | None,
) -> None:
    """Run a training step of a MODEL under a plan; exit code 1 if it does not hold.

    With --html the page lays the bytes that were measured over those that were projected.
    """
    from ..executor.verify import verify as run_verify
    from ..planner.plan import Plan
    from ..planner.planner import plan_one

    if (plan_file is None) == (budget is None):
        raise click.UsageError("give a saved plan or --budget, one of the two")
    check_writable(page)
    target = runnable_target(model, inputs, "verify")
    if budget is not None:
        plan = plan_one(profile_target(model, target), budget)
    else:
        plan = Plan.load(plan_file or "", certify=False)
    timeline = page is not None
    result = run_verify(target.model, plan, target.sample, rounds=rounds, timeline=timeline)
    answer(lambda: click.echo(str(result)), lambda: facts_of_verification(result), data)
    if page is not None:
        plan.to_html(page, verified=result)
        if data != ALONE:
            click.echo(f"\npage written to {page}")
    if not result.ok:
        ctx.exit(1)


@main.command("completion", epilog=example('eval "$(ckptsched completion bash)"'))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what completes commands and options in a shell; its start-up file may run it."""
    kind = get_completion_class(shell)
    assert kind is not None  # the choices are click's own
    click.echo(kind(main, {}, "ckptsched", "_CKPTSCHED_COMPLETE").source())
