"""Arguments of the adjoint equation: torchdiffeq's `adjoint_*`, read or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..base.errors import WorkloadError
from .adaptive.norms import Norm, rms_norm
from .function.callbacks import OF_ADJOINT, callbacks_of
from .function.options import check_fixed_options, read_control
from .function.tuple_state import Shapes, split
from .methods.integrators import Leapfrog, UserStep, find_integrator, is_adaptive


@final
@dataclass(frozen=True)
class AdjointSettings:
    """The `adjoint_*` arguments of a call; None where one was not given."""

    rtol: Any = None
    atol: Any = None
    method: Any = None
    options: Mapping[str, Any] | None = None

    def check_unused(self) -> None:
        """Refuse all of them where no adjoint equation is solved."""
        given = self._given("rtol", "atol", "method", "options")
        if given:
            raise WorkloadError(
                f"{given} given, and gradient='exact' differentiates the steps "
                "themselves, so that no adjoint equation is solved: leave it out, or take "
                "gradient='backsolve'"
            )

    def _given(self, *names: str) -> str:
        return ", ".join(f"adjoint_{name}" for name in names if getattr(self, name) is not None)

    def solver(
        self, rtol: Any, atol: Any, method: Any, options: Mapping[str, Any], norm: Norm,
        shapes: Shapes,
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments of the solve of the adjoint equation: rtol, atol, method and options.

        Those of the forward pass are for an adjoint without its own; `norm` is of flat states. A
        WorkloadError, already in the forward pass, where one makes no sense or does not fit.
        """
        if self.options is None and options and self.method not in (None, method):
            raise WorkloadError(
                f"options {sorted(options)} are those of the forward pass, and adjoint_method "
                f"{self.method!r} is another method than {method!r}; give adjoint_options, if only "
                "{}"
            )
        given = dict(options if self.options is None else self.options)
        own_norm = None if self.options is None else given.get("norm")
        given.pop("norm", None)
        own_method = method if self.method is None else self.method
        if self._check_steps(own_method, given):
            rtol, atol = _tolerance("rtol", self.rtol, rtol), _tolerance("atol", self.atol, atol)
        given["norm"] = _norm(own_norm, norm, shapes)
        return {"rtol": rtol, "atol": atol, "method": own_method, "options": given}

    def _check_steps(self, method: Any, options: Mapping[str, Any]) -> bool:
        """Refuse a method or options that do not fit; returns whether it chooses its steps."""
        # With the shapes of a pair, which leapfrog asks for first.
        integrator = find_integrator(method, (torch.Size(), torch.Size()))
        if isinstance(integrator, Leapfrog):
            raise WorkloadError(
                "the adjoint equation is none for 'leapfrog': state and adjoint are no positions "
                "and momenta; give another adjoint_method, such as 'rk4', or take gradient='exact'"
            )
        if isinstance(integrator, UserStep) and self.method is None:
            raise WorkloadError(
                "the adjoint equation has a tuple as its state, of state, adjoint and integrals, "
                "which the step function given as method was not meant for; give adjoint_method, "
                "a name or a step function for such tuples, or take gradient='exact'"
            )
        if is_adaptive(integrator, options):
            read_control(options)
            return True
        check_fixed_options(options)
        unread = self._given("rtol", "atol")
        if unread:
            raise WorkloadError(
                f"{unread} given, and the adjoint equation is solved by {method!r:.80} "
                "on a fixed grid, which keeps no tolerance: leave it out, or give an adaptive "
                "adjoint_method, such as 'dopri5', and adjoint_options={}"
            )
        return False


def _tolerance(name: str, own: Any, other: Any) -> float:
    """A tolerance of the adjoint equation: its own, or that of the forward pass."""
    given, name = (other, name) if own is None else (own, f"adjoint_{name}")
    scalar = not isinstance(given, Tensor) or given.numel() == 1
    wanted = isinstance(given, Tensor) and given.requires_grad  # a gradient that there is not
    try:
        value = float(given) if scalar and not wanted else math.nan
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not 0 <= value < math.inf:
        told = f"a tensor of shape {tuple(given.shape)}" if not scalar else f"{given!r:.80}"
        raise WorkloadError(
            f"{name} is {told}, and the adjoint equation, whose parts are others than the "
            f"state's, takes one number; give adjoint_{name.removeprefix('adjoint_')} as a number "
            "that is not negative, without a gradient"
        )
    return value


def _norm(given: Any, norm: Norm, shapes: Shapes) -> Callable[[Any], Tensor]:
    """The norm of state, adjoint and integrals, as torchdiffeq has it; `norm` is of flat states.

    `given` is a function of (time, states, adjoints, integrals); "seminorm", which leaves out the
    integrals; or None.
    """
    if given not in (None, "seminorm") and not callable(given):
        raise WorkloadError(
            f"adjoint_options has norm={given!r}; give 'seminorm', or a function of the tuple "
            "(time, state, adjoint, integrals ...)"
        )

    def found(parts: tuple[Tensor, ...]) -> Tensor:
        state, adjoint, *integrals = parts
        if callable(given):
            time = state.new_zeros((), dtype=state.dtype.to_real())
            split_up = [split(x, shapes) for x in (state, adjoint)]
            flat = [x for part in split_up for x in (part if shapes is not None else (part,))]
            size: Tensor = given((time, *flat, *integrals))
            return size
        sizes = [norm(state), norm(adjoint)]
        if given is None:
            sizes += [rms_norm(x) for x in integrals]
        return torch.stack(sizes).max()

    return found


def hand_on_callbacks(func: Callable[..., Any], rates: Any) -> None:
    """Give the adjoint equation's right-hand side the adjoint callbacks of func as its own."""
    for name, function in callbacks_of(func, OF_ADJOINT).items():
        setattr(rates, name.removesuffix("_adjoint"), function)
