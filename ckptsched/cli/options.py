"""What commands are given: models with their inputs, and files of chains and plans."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..base.errors import PlanMismatchError, WorkloadError
from ..base.json_files import read_json
from ..planner import TIME_LIMIT

if TYPE_CHECKING:
    from ..planner.plan import Plan
    from ..planner.plan_words import Workload
    from ..planner.planner import PlanOptions
    from ..workload.chain import Chain
    from .targets import Inputs, Target


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


_argument_option = click.option(
    "--arg",
    "arguments",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_argument,
    help="Argument of the callable, such as steps=8; may be given several times.",
)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a model is made and what it is fed, as one `Inputs`."""

    @click.option("--input", "shape", metavar="SHAPE", help="Batch shape, such as 8x3x32x32.")
    @click.option("--dtype", default="float32", show_default=True, help="Dtype of the input.")
    @click.option("--device", default="cpu", show_default=True, help="Where to run the model.")
    @_argument_option
    @functools.wraps(command)
    def with_inputs(
        *, shape: str | None, dtype: str, device: str, arguments: dict[str, Any], **rest: Any
    ) -> None:
        from .targets import Inputs

        command(inputs=Inputs(shape=shape, dtype=dtype, device=device, arguments=arguments), **rest)

    return with_inputs


def fit_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `fit`, as the arguments of `will_it_fit`, and how the model is made."""

    @click.option(
        "--input",
        "texts",
        metavar="[NAME=][DTYPE:]SHAPE",
        multiple=True,
        help="An argument of the call, such as input_ids=int64:8x2048; may be given several times.",
    )
    @click.option("--device", help="A device by name, such as H100: memory, kernels and rates.")
    @click.option("--device-memory", help="What may be used of it, such as 80GiB.")
    @click.option("--optimizer", default="adamw", show_default=True, help="Whose state is kept.")
    @click.option("--dtype", help="What model and inputs are turned to, such as bf16.")
    @click.option("--master-weights", is_flag=True, help="The optimizer has them in float32.")
    @click.option("--devices", type=int, default=1, show_default=True, help="How many share.")
    @click.option(
        "--shard", default="none", show_default=True, help="none, optimizer, grads or full."
    )
    @click.option(
        "--largest",
        multiple=True,
        help='"batch" or "sequence": search the largest that fits; may be given twice.',
    )
    @_argument_option
    @functools.wraps(command)
    def with_options(
        *,
        model: str,
        texts: tuple[str, ...],
        arguments: dict[str, Any],
        data: str | None,
        options: PlanOptions,
        **asked: Any,
    ) -> None:
        command(
            model=model, texts=texts, arguments=arguments, data=data, asked={**asked, **options}
        )

    return with_options


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how to plan, as `PlanOptions`."""

    @click.option(
        "--solver", default="auto", show_default=True, help='Name of a solver; "auto" picks.'
    )
    @click.option(
        "--time-limit",
        type=click.FloatRange(min=0, min_open=True),
        default=TIME_LIMIT,
        show_default=True,
        help="Seconds that an integer program may take.",
    )
    @click.option("--no-cache", is_flag=True, help="Keep no plans on disk, and read none.")
    @functools.wraps(command)
    def with_options(*, solver: str, time_limit: float, no_cache: bool, **rest: Any) -> None:
        options: PlanOptions = {
            "solver": solver,
            "time_limit": time_limit,
            "cache": not no_cache,
        }
        command(options=options, **rest)

    return with_options


def is_file(target: str) -> bool:
    """Whether a target is a file rather than module:callable."""
    return target.endswith(".json") or Path(target).is_file()


def read_or_profile(target: str, inputs: Inputs, *, fake: bool) -> Workload:
    """The chain or graph in a file, or the chain of a model."""
    from ..planner.plan import Plan

    if fake or not is_file(target):
        return profile_target(target, runnable_target(target, inputs, "--fake"), fake=fake)
    found = read_file(target)
    if isinstance(found, Plan):
        raise PlanMismatchError(f"{target!r} holds a plan: give the model or the chain")
    return found


def profile_target(name: str, target: Target, *, fake: bool = False) -> Chain:
    """The chain of a model, named as the command line names it."""
    from ..profiler.profile import profile as make_profile

    chain = make_profile(target.model, target.sample, fake=fake)
    shown = name.partition(":")[2] + (" (estimated)" if fake else "")
    return replace(chain, name=chain.name or shown)


def read_file(path: str) -> Workload | Plan:
    """What a file holds: a chain, a graph or a plan."""
    from ..planner.plan import FORMAT, Plan
    from ..workload.chain import Chain
    from ..workload.graph import Graph
    from ..workload.saved import WRITES_ONE

    data, source = read_json(path, WorkloadError, WRITES_ONE), repr(path)
    if isinstance(data, dict) and data.get("format") == FORMAT:
        return Plan.from_saved(data, source)
    if not isinstance(data, dict) or not {"u_f", "nodes"} & set(data):
        raise WorkloadError(f"{source} holds neither a chain, nor a graph, nor a plan")
    return (Graph if "nodes" in data else Chain).from_saved(data, source)


def runnable_target(target: str, inputs: Inputs, purpose: str) -> Target:
    """A model that can be run."""
    from .targets import load_target

    if is_file(target):
        raise WorkloadError(
            f"{purpose} needs a model, and {target!r} is a file: give module:callable, such as "
            "models.resnet:ode_resnet18"
        )
    return load_target(target, inputs)
