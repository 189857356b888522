"""The commands: ckptsched profile, plan, report, show, verify."""

from __future__ import annotations

import ast
import errno
import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import click

from .errors import CkptschedError, PlanMismatchError, WorkloadError
from .planner import plan as make_plan
from .plans import FORMAT, Plan
from .profiler import profile as make_profile
from .report import Outputs, make_console, print_chain, report, timeline
from .targets import Inputs, Target, load_target
from .verifier import Verification
from .verifier import verify as run_verify
from .workload import Chain

_BUDGET_HELP = 'Bytes, or text such as "64MiB", "1.5 GB" or "40%" of what storing everything needs.'
_FAKE_HELP = "Estimate the MODEL on tensors without data: for planning only, seconds are guesses."
_ROUNDS_HELP = "How often to time a step under the plan and one of plain autograd, in turn."
_SOLVER_HELP = 'Name of a solver; "auto" picks.'


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
            raise _Failure(" ".join(str(error).split())) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader such as `head` has enough: end quietly
                raise
            place = f": {str(error.filename)!r}" if error.filename else ""
            raise _Failure(f"{error.strerror or error}{place}") from error


def _argument(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Read key=value pairs: Python literals where they are, else strings."""
    pairs = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not key=value, such as steps=8", ctx, option)
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a model is made and what it is fed, as one `Inputs`."""

    @click.option("--input", "shape", metavar="SHAPE", help="Batch shape, such as 8x3x32x32.")
    @click.option("--dtype", default="float32", show_default=True, help="Dtype of the input.")
    @click.option("--device", default="cpu", show_default=True, help="Where to run the model.")
    @click.option(
        "--arg",
        "arguments",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_argument,
        help="Argument of the callable, such as steps=8; may be given several times.",
    )
    @functools.wraps(command)
    def with_inputs(
        *, shape: str | None, dtype: str, device: str, arguments: dict[str, Any], **rest: Any
    ) -> None:
        command(inputs=Inputs(shape=shape, dtype=dtype, device=device, arguments=arguments), **rest)

    return with_inputs


def _is_file(target: str) -> bool:
    return target.endswith(".json") or Path(target).is_file()


def _chain_of(target: str, inputs: Inputs, *, fake: bool) -> Chain:
    """The chain in a file, or that of a model."""
    if fake or not _is_file(target):
        return _profile(target, _target_of(target, inputs, "--fake"), fake=fake)
    found = _read(target)
    if isinstance(found, Plan):
        raise PlanMismatchError(f"{target!r} holds a plan: give the model or the chain")
    return found


def _profile(name: str, target: Target, *, fake: bool = False) -> Chain:
    chain = make_profile(target.model, target.sample, fake=fake)
    shown = name.partition(":")[2] + (" (estimated)" if fake else "")
    return replace(chain, name=chain.name or shown)


def _read(path: str) -> Chain | Plan:
    """What a file holds: a chain or a plan."""
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise WorkloadError(
            f"{path!r} cannot be read: {error.strerror}; `ckptsched profile MODEL -o FILE` "
            "writes a chain, `ckptsched plan` a plan"
        ) from error
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{path!r} is damaged: it is not JSON ({error})") from error
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return Plan.from_json(data, repr(path))
    if not isinstance(data, dict) or "u_f" not in data:
        raise WorkloadError(f"{path!r} holds neither a chain nor a plan")
    try:
        return Chain.from_json(data)
    except WorkloadError as error:
        raise WorkloadError(f"{path!r}: {error}") from error


def _target_of(target: str, inputs: Inputs, purpose: str) -> Target:
    """A model that can be run."""
    if _is_file(target):
        raise WorkloadError(
            f"{purpose} needs a model, and {target!r} is a file: give module:callable, such as "
            "models.resnet:ode_resnet18"
        )
    return load_target(target, inputs)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    # The package imports its modules, never the other way round; it is there when this runs.
    getattr(sys.modules[__package__], "__version__", "unknown") if __package__ else "unknown",
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
@_model_options
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the chain here.")
def profile_command(model: str, inputs: Inputs, fake: bool, output: str | None) -> None:
    """Measure seconds and bytes of every stage of a MODEL."""
    target = _target_of(model, inputs, "profile")
    chain = _profile(model, target, fake=fake)
    if output is not None:
        chain.save(output)
    print_chain(chain, make_console(), make_plan(chain, budget="100%"))
    if output is not None:
        click.echo(f"\nchain written to {output}")


@main.command("plan")
@click.argument("model", metavar="MODEL|CHAIN")
@_model_options
@click.option("--budget", required=True, help=_BUDGET_HELP)
@click.option("--solver", default="auto", show_default=True, help=_SOLVER_HELP)
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan here.")
def plan_command(
    model: str, inputs: Inputs, budget: str, solver: str, fake: bool, output: str | None
) -> None:
    """Find the schedule that takes least time within a budget."""
    plan = make_plan(_chain_of(model, inputs, fake=fake), budget=budget, solver=solver)
    if output is not None:
        plan.save(output)
    click.echo(str(plan))
    if output is not None:
        click.echo(f"\nplan written to {output}")


@main.command("report")
@click.argument("model", metavar="MODEL|CHAIN")
@_model_options
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
@click.option("--solver", default="auto", show_default=True, help=_SOLVER_HELP)
@click.option("--fake", is_flag=True, help=_FAKE_HELP)
@click.option("--measure", is_flag=True, help="Run a training step under every plan.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help=_ROUNDS_HELP)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the trade-off here.")
@click.option("--json", "data", type=click.Path(dir_okay=False), help="Save the trade-off here.")
@click.pass_context
def report_command(
    ctx: click.Context,
    model: str,
    inputs: Inputs,
    budgets: int,
    budget: tuple[str, ...],
    solver: str,
    fake: bool,
    measure: bool,
    rounds: int,
    plot: str | None,
    data: str | None,
) -> None:
    """Print the trade-off between bytes and seconds, beside the usual rules of thumb.

    With --measure the exit code is 1 where a step broke its budget or changed a gradient.
    """
    outputs = Outputs(plot=plot, json=data)
    outputs.check()  # before the model is measured, which takes a while
    if fake and measure:
        raise click.UsageError("--fake runs nothing, --measure runs every plan: give one of them")
    if not measure:
        chain = _chain_of(model, inputs, fake=fake)
        report(chain, budgets, also=budget, solver=solver, outputs=outputs)
        return
    target = _target_of(model, inputs, "--measure")

    def run(plan: Plan) -> Verification:
        return run_verify(target.model, plan, target.sample, rounds=rounds)

    chain = _profile(model, target)
    found = report(chain, budgets, also=budget, solver=solver, measure=run, outputs=outputs)
    if any(row.measured is not None and not row.measured.ok for row in found.rows):
        ctx.exit(1)


@main.command("show")
@click.argument("file", metavar="CHAIN|PLAN")
@click.option("--timeline", "picture", is_flag=True, help="Draw the bytes over the operations.")
@click.option("--operations", is_flag=True, help="Print the schedule.")
def show_command(file: str, picture: bool, operations: bool) -> None:
    """Print what a saved chain or plan holds; of a chain, the plan that stores everything."""
    found = _read(file)
    if isinstance(found, Plan):
        plan = found
        click.echo(str(plan))
    else:
        plan = make_plan(found, budget="100%")
        print_chain(found, make_console(), plan)
    if picture:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        ascii_only = not encoding.lower().startswith("utf")
        click.echo("\n" + timeline(plan, ascii_only=ascii_only))
    if operations:
        click.echo("\n" + plan.schedule.to_text())


@main.command("verify")
@click.argument("model")
@click.argument("plan_file", metavar="[PLAN]", required=False)
@_model_options
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
    if (plan_file is None) == (budget is None):
        raise click.UsageError("give a saved plan or --budget, one of the two")
    target = _target_of(model, inputs, "verify")
    if budget is not None:
        plan = make_plan(_profile(model, target), budget=budget)
    else:
        plan = Plan.load(plan_file or "")
    result = run_verify(target.model, plan, target.sample, rounds=rounds)
    click.echo(str(result))
    if not result.ok:
        ctx.exit(1)
