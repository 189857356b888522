"""The commands: ckptsched profile, plan, largest, fit, report, show, verify."""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING, Any, final

import click

from ..base.errors import CkptschedError
from ..base.json_files import check_writable, printable, render_json
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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    # The package imports its modules, never the other way round; it is there when this runs.
    getattr(sys.modules[__name__.partition(".")[0]], "__version__", "unknown"),
    prog_name="ckptsched",
)
def main() -> None:
    """Fit PyTorch training into a byte budget.

    A MODEL is module:callable, found from the current folder, such as
    models.resnet:ode_resnet18; a saved chain may stand in its place where nothing is run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of stages may be in any script
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command("profile")
@click.argument("model")
@model_options
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the chain here.")
def profile_command(model: str, inputs: Inputs, fake: bool, output: str | None) -> None:
    """Measure seconds and bytes of every stage of a MODEL."""
    from ..planner.planner import plan_one
    from ..report.report import make_console, print_chain

    check_writable(output)
    target = runnable_target(model, inputs, "profile")
    chain = profile_target(model, target, fake=fake)
    if output is not None:
        chain.save(output)
    print_chain(chain, make_console(), plan_one(chain, "100%"))
    if output is not None:
        click.echo(f"\nchain written to {output}")


@main.command("plan")
@click.argument("model", metavar="MODEL|CHAIN")
@model_options
@plan_options
@click.option("--budget", help=_BUDGET_HELP)
@click.option("--overhead", help=f"Instead of a budget: find the least. {_OVERHEAD_HELP}")
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan here.")
def plan_command(
    model: str,
    inputs: Inputs,
    budget: str | None,
    overhead: str | None,
    fake: bool,
    options: PlanOptions,
    output: str | None,
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
    click.echo(str(plan))
    if output is not None:
        click.echo(f"\nplan written to {output}")


@main.command("largest")
@click.argument("model", metavar="MODEL|CHAIN")
@model_options
@plan_options
@click.option("--budget", required=True, help=_BUDGET_HELP)
@click.option("--overhead", help=_OVERHEAD_HELP)
@click.option("--steps", is_flag=True, help="Ask for steps of an ODE block, not for the batch.")
@click.option("--most", type=click.IntRange(min=1), help=_MOST_HELP)
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan here.")
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
    click.echo(str(found))
    if output is not None:
        click.echo(f"\nplan written to {output}")


@main.command("fit")
@click.argument("model")
@plan_options
@fit_options
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def fit_command(
    model: str, texts: tuple[str, ...], arguments: Any, as_json: bool, asked: dict[str, Any]
) -> None:
    """Tell whether training a MODEL fits a device, from shapes alone: nothing is run.

    Example: ckptsched fit models.resnet:ode_resnet18 --input 64x3x32x32 --device T4

    The exit code is 1 where it does not fit, with no plan either.
    """
    from ..fitting.before_a_run.asking import will_it_fit
    from .targets import inputs_without_data, load_without_data

    taken, named = inputs_without_data(texts)
    found = will_it_fit(load_without_data(model, arguments), *taken, kwargs=named, **asked)
    click.echo(render_json(found.to_json()) if as_json else str(found))
    if not found.fits_with_plan:
        raise SystemExit(1)


@main.command("report")
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
@click.option("--json", "data", type=click.Path(dir_okay=False), help="Save the trade-off here.")
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
    from ..report.report import Outputs, report

    outputs = Outputs(plot=plot, json=data, html=page)
    outputs.check()  # before the model is measured, which takes a while
    if fake and measure:
        raise click.UsageError("--fake runs nothing, --measure runs every plan: give one of them")
    if not measure:
        chain = read_or_profile(model, inputs, fake=fake)
        report(chain, budgets, also=budget, outputs=outputs, **options)
        return
    from ..executor.verify import verify as run_verify

    target = runnable_target(model, inputs, "--measure")

    def run(plan: Plan) -> Verification:
        return run_verify(target.model, plan, target.sample, rounds=rounds)

    chain = profile_target(model, target)
    found = report(chain, budgets, also=budget, measure=run, outputs=outputs, **options)
    if any(row.measured is not None and not row.measured.ok for row in found.rows):
        ctx.exit(1)


@main.command("show")
@click.argument("file", metavar="CHAIN|GRAPH|PLAN")
@click.option("--timeline", "picture", is_flag=True, help="Draw the bytes over the operations.")
@click.option("--operations", is_flag=True, help="Print the schedule.")
@click.option("--explain", is_flag=True, help="Say why: what binds, what other budgets would buy.")
@click.option("--html", "page", type=click.Path(dir_okay=False), help=_HTML_HELP)
@plan_options
def show_command(
    file: str,
    picture: bool,
    operations: bool,
    explain: bool,
    page: str | None,
    options: PlanOptions,
) -> None:
    """Print what a saved chain, graph or plan holds; of a chain, the plan that stores all."""
    from ..planner.explanation import explain_plan
    from ..planner.plan import Plan
    from ..planner.planner import plan_one
    from ..report.report import make_console, print_chain, timeline
    from ..workload.graph import Graph

    check_writable(page)
    found = read_file(file)
    if isinstance(found, Plan):
        plan = found
        click.echo(str(plan))
    else:
        plan = plan_one(found, "100%", **options)
        print_chain(found, make_console(), plan)
    if explain:
        click.echo("\n" + str(explain_plan(plan, **options)))
    if picture:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        ascii_only = not encoding.lower().startswith("utf")
        click.echo("\n" + timeline(plan, ascii_only=ascii_only))
    if operations:
        named = plan.chain.schedule_text if isinstance(plan.chain, Graph) else None
        click.echo("\n" + (named(plan.schedule) if named else plan.schedule.to_text()))
    if page is not None:
        plan.to_html(page)
        click.echo(f"\npage written to {page}")


@main.command("verify")
@click.argument("model")
@click.argument("plan_file", metavar="[PLAN]", required=False)
@model_options
@click.option("--budget", help=f"Plan for this budget, where no PLAN is given. {_BUDGET_HELP}")
@click.option("--rounds", type=click.IntRange(min=0), default=3, help=_ROUNDS_HELP)
@click.pass_context
def verify_command(
    ctx: click.Context,
    model: str,
    plan_file: str | None,
    inputs: Inputs,
    budget: str | None,
    rounds: int,
) -> None:
    """Run a training step of a MODEL under a plan; exit code 1 if it does not hold."""
    from ..executor.verify import verify as run_verify
    from ..planner.plan import Plan
    from ..planner.planner import plan_one

    if (plan_file is None) == (budget is None):
        raise click.UsageError("give a saved plan or --budget, one of the two")
    target = runnable_target(model, inputs, "verify")
    if budget is not None:
        plan = plan_one(profile_target(model, target), budget)
    else:
        plan = Plan.load(plan_file or "", certify=False)
    result = run_verify(target.model, plan, target.sample, rounds=rounds)
    click.echo(str(result))
    if not result.ok:
        ctx.exit(1)
