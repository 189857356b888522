"""Says what a training step keeps in memory, by module, and what `fit` would make of it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import nn

from ..base.budget import format_bytes
from ..base.errors import CkptschedError, InfeasibleBudgetError, PlanMismatchError, ProfileError
from ..base.text_table import Grid
from ..capture.inspection import inspect_model
from ..capture.wrappers import in_place
from ..executor.checkpointed import Checkpointed
from ..memory.live_storages import Kind, LiveBytes, LiveStorages
from ..planner.plan import Plan
from ..planner.planner import plan_each, plan_one
from ..profiler.profile import profile
from ..torch_state.replay_context import Autocast
from ..workload.chain import Chain
from ..workload.graph import Graph
from .fit import plan_of

MOST_MODULES = 12
"""Modules that are named in a table; the others are one row."""
# Budgets that `fit` is asked for, by the way from the least that works to what stores everything.
_WAYS = (2 / 3, 1 / 3, 0.0)
# What PyTorch's CPU allocator and others say where there is no memory left, in a RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cure:
    """A budget that `fit` keeps, and what that costs."""

    budget_bytes: int
    """The budget: what a step may take beyond parameters, their gradients counted."""
    overhead: float
    """Seconds of recomputation over those of a plain step, projected."""


@final
class MemoryExplanation:
    """What `explain_memory` has seen; its figures are there when the block has ended."""

    def __init__(self) -> None:
        self._live: tuple[LiveBytes, ...] | None = None
        self.ran_out = False
        """Whether the block ended for want of memory; what is live is then told of that moment."""
        self.store_all_bytes: int | None = None
        """What a plain step takes, as budgets count it; None where no cures are known."""
        self.cures: tuple[Cure, ...] = ()
        """What `fit` would give, the largest budget first."""
        self.why_no_cures = ""
        """Why there are none; empty where there are some."""

    @property
    def live(self) -> tuple[LiveBytes, ...]:
        """What was alive when most was, or when memory ran out, largest first.

        Raises:
            ProfileError: The block has not ended.
        """
        if self._live is None:
            raise ProfileError(
                "what is live is told when the `with explain_memory` block has ended, and it is "
                "still open; ask after it"
            )
        return self._live

    @property
    def live_bytes(self) -> int:
        """Bytes of all that; raises as `live` does."""
        return sum(part.bytes for part in self.live)

    def bytes_of(self, kind: Kind) -> int:
        """Bytes of one kind; raises as `live` does."""
        return sum(part.bytes for part in self.live if part.kind is kind)

    def to_dict(self) -> dict[str, Any]:
        """All figures for JSON: bytes are int, overheads shares; raises as `live` does."""
        return {
            "ran_out": self.ran_out,
            "live_bytes": self.live_bytes,
            "live": [{**asdict(part), "kind": part.kind.value} for part in self.live],
            "store_all_bytes": self.store_all_bytes,
            "cures": [asdict(cure) for cure in self.cures],
            "why_no_cures": self.why_no_cures,
        }

    def __str__(self) -> str:
        """Tables by kind and by module, and what `fit` would give."""
        if self._live is None:
            return "what is live in memory is told when the block has ended"
        parts = [str(table) for table in (self._kinds(), self._modules())]
        return "\n\n".join([f"{self._kinds().title}:", *parts, self._cured()])

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        if self._live is None:
            return f"<p>{self}</p>"
        return f"{self._kinds().to_html()}{self._modules().to_html()}<pre>{self._cured()}</pre>"

    def _kinds(self) -> Grid:
        when = "memory ran out" if self.ran_out else "most was"
        sizes = {kind: self.bytes_of(kind) for kind in Kind}
        total = max(1, self.live_bytes)
        found = [(k.value, size) for k, size in sizes.items() if size] + [("all", total)]
        return Grid(
            title=f"live in memory when {when}",
            headings=("kind", "bytes", "share"),
            rows=tuple([(k, format_bytes(size), f"{size / total:.1%}") for k, size in found]),
            names_first=True,
        )

    def _modules(self) -> Grid:
        shown, rest = self.live[:MOST_MODULES], self.live[MOST_MODULES:]
        rows = [
            (part.module or "-", part.kind.value, format_bytes(part.bytes), str(part.storages))
            for part in shown
        ]
        if rest:
            size, count = sum(x.bytes for x in rest), sum(x.storages for x in rest)
            rows.append((f"and {len(rest)} more", "", format_bytes(size), str(count)))
        return Grid(
            title="by module, largest first",
            headings=("module", "kind", "bytes", "tensors"),
            rows=tuple(rows),
            names_first=True,
        )

    def _cured(self) -> str:
        if not self.cures:
            return f"what ckptsched.fit would give is not known: {self.why_no_cures}"
        whole = format_bytes(self.store_all_bytes or 0)
        lines = [f"without a plan a step takes {whole} beyond parameters"]
        for cure in self.cures:
            lines.append(
                f"ckptsched.fit(model, ..., budget={cure.budget_bytes}) keeps "
                f"{format_bytes(cure.budget_bytes)}, for {cure.overhead:.1%} more time"
            )
        return "\n".join(lines)


@final
class explain_memory:
    """Watch a training step, and say which modules' tensors fill the memory.

    Around a step, or several: forward, backward, and the optimizer's step if it is to count. Each
    operation is watched, which takes time; gradients are the same to the bit, and nothing is kept
    alive but the arguments of the model's first call, until the block ends. An error for want of
    memory (`torch.OutOfMemoryError`, that of the CPU's allocator, MemoryError) and a budget that
    nothing fits stay what they are, and get a note of what was live. Memory that operations take
    for themselves, and that is no tensor, is not seen. Of a model that
    is fitted, what stages make counts as the whole model's.

    Args:
        model: The model that is trained; wrapped by DDP, compiled or fitted, too.
        optimizer: One whose state is there already, so that it counts from the start; one that
            steps inside is found without.
        cures: Whether to plan for the first call, when the block has ended, and tell three budgets
            with their overhead. That runs the model's stages some times.

    Raises:
        ProfileError: It is no module.

    Returns:
        As the target of `with` a `MemoryExplanation`: print it after the block.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        cures: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProfileError(
                f"explain_memory was given a {type(model).__name__}; give it the nn.Module that is "
                "trained"
            )
        self._model = model
        one = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizers: tuple[Any, ...] = (optimizer,) if one else (*optimizer,)  # type: ignore[misc]
        self._cures = cures
        self._explained = MemoryExplanation()
        self._watch: LiveStorages | None = None
        self._call: _Call | None = None
        self._unhook: Callable[[], None] = lambda: None

    def __enter__(self) -> MemoryExplanation:
        """Watch from now on; a ProfileError where this very block is open already."""
        if self._watch is not None:
            raise ProfileError("this explain_memory is in use; make one for each `with`")
        self._explained, self._call = MemoryExplanation(), None
        # Hooks of modules would have to run within stages, which a plan refuses.
        self._watch = LiveStorages(
            self._model, self._optimizers, by_module=not _is_fitted(self._model)
        )
        self._unhook = self._model.register_forward_pre_hook(
            self._first_call, prepend=True, with_kwargs=True
        ).remove
        self._watch.__enter__()
        return self._explained

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Tell what was live, and plan; an error for want of memory is handed on with a note."""
        watch, call, seen = self._watch, self._call, self._explained
        assert watch is not None
        self._watch = self._call = None
        self._unhook()
        watch.__exit__(kind, error, trace)
        seen.ran_out = error is not None and _is_for_want_of_memory(error)
        seen._live = watch.at_failure() if seen.ran_out else watch.at_peak()
        wanted = error is None or seen.ran_out
        if self._cures and wanted:
            _cure(seen, self._model, call)
        else:
            seen.why_no_cures = "it was not asked for" if wanted else "the block ended in an error"
        if error is not None and (seen.ran_out or isinstance(error, InfeasibleBudgetError)):
            error.add_note(str(seen))

    def _first_call(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._call is None and torch.is_grad_enabled():
            self._call = _Call(args, dict(kwargs), Autocast.take(_device(model)))


@dataclass(frozen=True)
class _Call:
    """The first call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: Autocast


def _is_fitted(model: nn.Module) -> bool:
    return any(isinstance(m, Checkpointed) or in_place(m) is not None for m in model.modules())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _is_for_want_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _NO_MEMORY)


def _cure(seen: MemoryExplanation, model: nn.Module, call: _Call | None) -> None:
    """Plan for a call, and note three budgets, or why there are none."""
    try:
        workload = _workload(model, call)
        if workload is None:
            seen.why_no_cures = "the model was not called with gradients on"
            return
        whole = plan_one(workload, "100%")
        least, room = whole.least_budget_bytes, whole.store_all_bytes - whole.least_budget_bytes
        budgets = dict.fromkeys([least + int(way * room) for way in _WAYS])
        plans = [x for x in plan_each(workload, [*budgets]) if isinstance(x, Plan)]
    except CkptschedError as error:
        seen.why_no_cures = str(error)
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        # Its stages are run one by one, which takes less than a step; even so it may be too much.
        if not _is_for_want_of_memory(error):
            raise
        seen.why_no_cures = f"memory ran out again while it was measured ({error})"
    else:
        seen.store_all_bytes = whole.store_all_bytes
        seen.cures = tuple([Cure(budget_bytes=x.budget_bytes, overhead=x.overhead) for x in plans])


def _workload(model: nn.Module, call: _Call | None) -> Chain | Graph | None:
    """What to plan: of a model that follows a plan, that plan's; else its first call's."""
    try:
        return plan_of(model).chain
    except (PlanMismatchError, ProfileError):
        pass
    if call is None:
        return None
    plain = inspect_model(model, "explain_memory", ProfileError).model
    with call.autocast.again():
        return profile(plain, *call.args, kwargs=call.kwargs)
