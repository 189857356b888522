"""A backend of torch.compile that runs the graph of a model by a plan, within a budget of bytes.

`torch.compile(model, backend="ckptsched", options={"budget": "60%"})`. What the compiler has read
is recorded, measured and planned when it is first called with tensors, for these sizes, and runs
with torch's own kernels. A budget holds for a step, and cannot be split between several graphs:
with gradients on, what is compiled must be one graph.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, fx, nn

from ..base.budget import Budget, parse_budget
from ..base.errors import BudgetWarning, CkptschedError, ProfileError
from ..capture.recording.stages import Captured, captured
from ..executor.checkpointed import Checkpointed, checkpointed
from ..planner.plan import Plan
from ..planner.planner import plan_one
from ..profiler.profile import profile
from ..profiler.stage_kind import Loss

_Code: TypeAlias = Callable[..., tuple[Any, ...]]

# Of one graph: models of one class share what was compiled, and each size is planned by itself.
_MOST_PLANS = 64

_ONE_GRAPH = (
    "a budget of bytes holds for a whole step and cannot be split between graphs. With "
    "fullgraph=True torch names everything that is in the way; or use ckptsched.captured(model, "
    "...), which needs no compiler"
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `options` of `torch.compile` may say."""

    budget: int | float | str | Budget
    """Bytes, text such as "256MiB", or a share such as "40%"."""
    loss: Loss | None = None
    """From what the graph gives, a tensor or a tuple of them, to a scalar."""
    solver: str = "auto"
    cuts: Literal["lean", "dear", "smallest", "every"] = "lean"
    """Where the graph may be cut into stages; see `captured`."""
    on_plan: Callable[[Plan], object] | None = None
    """Is given each plan when it is made, such as `print`."""

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, others: Mapping[str, Any]) -> Options:
        """Read them.

        Args:
            options: What `torch.compile` was given as `options`.
            others: What else it hands on.

        Raises:
            ProfileError: One is missing or unknown.
            BudgetSyntaxError: The budget cannot be read.
        """
        known = ", ".join(cls.__dataclass_fields__)
        unknown = [*others, *(name for name in options or {} if name not in cls.__slots__)]
        if unknown:
            raise ProfileError(
                f"torch.compile(..., backend='ckptsched') does not know {unknown[0]!r}; what it "
                f"takes, as options={{...}}, is {known}"
            )
        if not options or "budget" not in options:
            raise ProfileError(
                "torch.compile(..., backend='ckptsched') needs a budget: options={'budget': '60%'}"
            )
        found = cls(**options)
        parse_budget(found.budget)
        return found


def compiler_backend(
    graph: fx.GraphModule,
    example: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    **others: Any,
) -> _Code:
    """Make a graph run by a plan: the backend of torch.compile that is called "ckptsched".

    A step has the gradients, buffers and random numbers of plain autograd, bit for bit, and its
    projected bytes, as by `fit`. Without gradients the graph runs as it is. Each batch of other
    sizes is measured and planned when it first comes.

    Args:
        graph: What the compiler has read.
        example: Its inputs, perhaps without values; not used.
        options: "budget", which is needed; "loss", from the tensor that the graph gives, or the
            tuple of tensors, to a scalar; "solver" and "cuts", as `fit` and `captured` take them;
            and "on_plan", a function that is given each plan when it is made.
        others: Nothing; what else `torch.compile` hands on is refused.

    Returns:
        What runs in place of the graph. It raises errors of ckptsched when it is called, as the
        compiler would wrap those that are raised here: ProfileError where an option is missing or
        unknown, where the graph is not all of what was compiled, or cannot be measured;
        BudgetSyntaxError and InfeasibleBudgetError as `fit`.

    Example:
        >>> model = torch.compile(model, backend="ckptsched", options={"budget": "60%"})
        >>> model(x).mean().backward()
    """
    try:
        read = Options.read(options, others)
    except (CkptschedError, TypeError) as error:
        return _refuses(error)
    _warn_of_limit(graph)
    return _GraphCode(graph, read, _why_not_whole(graph))


def _refuses(error: Exception) -> _Code:
    def refuse(*args: Any) -> tuple[Any, ...]:
        raise error.with_traceback(None)

    return refuse


@final
class _GraphCode:
    """What runs in place of a graph."""

    def __init__(self, graph: fx.GraphModule, options: Options, why_not_whole: str) -> None:
        self._graph, self._options, self._why_not_whole = graph, options, why_not_whole
        self._inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._planned: OrderedDict[object, _Planned] = OrderedDict()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph: by a plan where gradients are on."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and self._why_not_whole:
            raise ProfileError(self._why_not_whole)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return tuple(self._graph.forward(*args))
        key = tuple(map(_layout, args))
        planned = self._planned.get(key)
        if planned is None:
            planned = _Planned(self._owning(args), args, self._options)
            self._planned[key] = planned
            if len(self._planned) > _MOST_PLANS:
                self._planned.popitem(last=False)
        self._planned.move_to_end(key)
        return planned(args)

    def _owning(self, args: Sequence[Any]) -> _Graph:
        for node in self._graph.graph.nodes:
            if str(node.target) == "autograd_function_apply":
                raise ProfileError(
                    "the model applies a custom autograd Function, of which torch.compile makes "
                    "something that keeps tensors of its own; use ckptsched.captured(model, ...), "
                    "which takes it as it is"
                )
        if any(True for _ in self._graph.parameters()):
            raise ProfileError(
                "torch.compile keeps parameters in its graph and does not hand them in; set "
                "torch._dynamo.config.inline_inbuilt_nn_modules = True, torch's default"
            )
        return _Graph(self._graph, _Inputs(self._inputs, args))


@final
class _Planned:
    """A graph that follows a plan, for inputs of one layout."""

    def __init__(self, graph: _Graph, args: Sequence[Any], options: Options) -> None:
        self._graph = graph
        batch = graph.take(args)
        if not batch:
            raise ProfileError(
                "what was compiled is given no tensor besides parameters and buffers, so there is "
                "no batch to plan for"
            )
        self._net: Captured = captured(graph, *batch, cuts=options.cuts)
        chain = profile(self._net, self._net.take(*batch), loss=self._loss_of(options.loss))
        plan = plan_one(chain, options.budget, solver=options.solver)
        self._run: Checkpointed = checkpointed(self._net, plan)
        if options.on_plan is not None:
            options.on_plan(plan)

    def __call__(self, args: Sequence[Any]) -> tuple[Any, ...]:
        batch = self._net.take(*self._graph.take(args))
        return tuple(self._net.give(self._run(batch)))

    def _loss_of(self, loss: Loss | None) -> Loss | None:
        if loss is None:
            return None
        net = self._net

        def of_graph(output: Any) -> Tensor:
            given = net.give(output)
            return loss(given[0] if len(given) == 1 else given)

        return of_graph


@final
class _Inputs:
    """For each input of a graph its source: who owns it and its name, the batch, or its value.

    An object without attributes that could be compared, as a recording compares what modules have.
    """

    __slots__ = ("sources",)

    def __init__(self, nodes: Sequence[fx.Node], args: Sequence[Any]) -> None:
        self.sources: list[Any] = []
        for node, arg in zip(nodes, args, strict=True):
            if isinstance(arg, nn.Parameter):
                self.sources.append(("_parameters", node.name))
            elif not isinstance(arg, Tensor):
                self.sources.append(arg)
            else:
                owned = _lasts(node) and not arg.requires_grad
                self.sources.append(("_buffers", node.name) if owned else None)


@final
class _Graph(nn.Module):
    """A graph that owns what of its inputs lasts from step to step; the rest is the batch."""

    def __init__(self, graph: fx.GraphModule, inputs: _Inputs) -> None:
        super().__init__()
        self._code, self._inputs = graph.forward, inputs

    def take(self, args: Sequence[Any]) -> list[Tensor]:
        """Own the parameters and buffers of a call, which are most often the same as before.

        Args:
            args: The inputs of the graph.

        Returns:
            Those that are the batch.
        """
        batch = []
        for source, arg in zip(self._inputs.sources, args, strict=True):
            if source is None:
                batch.append(arg)
            elif isinstance(source, tuple):
                held = vars(self)[source[0]]
                if held.get(source[1]) is not arg:
                    held[source[1]] = arg
        return batch

    def forward(self, *batch: Tensor) -> tuple[Any, ...]:
        """Run the graph."""
        rest, args = iter(batch), []
        for source in self._inputs.sources:
            if isinstance(source, tuple):
                args.append(vars(self)[source[0]][source[1]])
            else:
                args.append(next(rest) if source is None else source)
        return tuple(self._code(*args))


def _lasts(node: fx.Node) -> bool:
    """Whether an input of a graph is a parameter, a buffer, or another tensor of a module.

    Where torch does not say it is part of the batch, which a stage may not change in place.
    """
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _layout(arg: Any) -> object:
    """What a plan holds for: parameters themselves, the layout of tensors, other values."""
    if isinstance(arg, nn.Parameter):
        return id(arg)
    if isinstance(arg, Tensor):
        return arg.shape, arg.dtype, arg.device, arg.requires_grad
    return type(arg), arg


# ---- whether a graph is all that was compiled ----------------------------------------------------


def _why_not_whole(graph: fx.GraphModule) -> str:
    """Why a graph may be a part of what was compiled; empty where it is all of it."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None:
        return (
            "torch.compile gives a graph and does not say whether it is the whole model, as where "
            "torch splits it for DistributedDataParallel; then set "
            f"torch._dynamo.config.optimize_ddp = False. {_ONE_GRAPH}"
        )
    at = f"{where.filename}:{where.lineno}" if (where := _last(reason.user_stack)) else "?"
    if reason.graph_break:
        line = f" ({where.line})" if where is not None and where.line else ""
        first = str(reason.reason).strip().splitlines()[0]
        return (
            f"torch.compile cannot read the model as one graph: it breaks at {at}{line}: {first}. "
            f"{_ONE_GRAPH}"
        )
    name = reason.user_stack[0].name if reason.user_stack else ""
    if name.startswith("torch_dynamo_resume_in"):
        return f"torch.compile reads a part of the model after a break, up to {at}. {_ONE_GRAPH}"
    around = _around_compiled()
    if around == "hooks":
        return (
            "the model itself has hooks, which torch.compile does not read into its graph; take "
            "them off, or compile a module that calls the model"
        )
    if around:
        return (
            f"torch.compile gave up reading {around} and compiles what that calls, piece by piece "
            f"(here {name} at {at}). {_ONE_GRAPH}"
        )
    return ""


def _warn_of_limit(graph: fx.GraphModule) -> None:
    """Say that the compiler is about to give up: what it then runs as it is has no budget."""
    count = getattr(graph.meta.get("dynamo_compile_id"), "frame_compile_id", None) or 0
    limit = getattr(torch._dynamo.config, "recompile_limit", None)
    if limit is not None and count + 1 >= limit:
        warnings.warn(
            f"torch.compile has compiled one function {count + 1} times, for other sizes, numbers "
            f"or models, and gives up after torch._dynamo.config.recompile_limit = {limit}: it may "
            "then run the model as it is, without a plan. Raise the limit, or give fullgraph=True, "
            "with which that is an error",
            BudgetWarning,
            stacklevel=2,
        )


def _last(stack: Sequence[Any]) -> Any:
    return stack[-1] if stack else None


def _around_compiled() -> str:
    """What of the user's runs uncompiled around what is being compiled; empty for nothing.

    The compiler stands where the frame that it compiles would: what has called that is on the
    stack, up to the wrapper that `torch.compile` has made.
    """
    dynamo = Path(torch.__file__).parent / "_dynamo"
    frames: list[CodeType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frames.append(frame.f_code)
        frame = frame.f_back
    if frame is None:
        return "a function that cannot be told"
    outer = list(takewhile(lambda c: not Path(c.co_filename).is_relative_to(dynamo), frames[::-1]))
    module = nn.modules.module.__file__
    for code in outer:
        if code.co_filename != module:
            return f"{code.co_qualname} at {code.co_filename}:{code.co_firstlineno}"
    names = [code.co_name for code in outer]
    return "hooks" if "inner" in names else ""
