"""How the adjoint equation is solved: torchdiffeq's `adjoint_*` arguments, read or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..errors import WorkloadError
from .callbacks import NAMES, OF_ADJOINT
from .control import Norm, rms_norm
from .integrators import split


@final
@dataclass(frozen=True)
class AdjointSettings:
    """What was asked for; None where nothing was."""

    rtol: Any = None
    atol: Any = None
    method: Any = None
    options: Mapping[str, Any] | None = None

    def check_unused(self) -> None:
        """Refuse settings of an equation that is not solved.

        Raises:
            WorkloadError: There are some.
        """
        given = [f"adjoint_{name}" for name, value in vars(self).items() if value is not None]
        if given:
            raise WorkloadError(
                f"{', '.join(given)} given, and gradient='exact' differentiates the steps "
                "themselves, so that no adjoint equation is solved: leave it out, or take "
                "gradient='backsolve'"
            )

    def solver(
        self, rtol: Any, atol: Any, method: Any, options: Mapping[str, Any], norm: Norm,
        shapes: tuple[torch.Size, ...] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments that the adjoint equation is solved with.

        Args:
            rtol: Of the forward pass, where there is none of the adjoint's.
            atol: The same.
            method: The same.
            options: The same; `norm` is of states.
            norm: That of flat states.
            shapes: Of the parts of the state where it is a tuple.

        Raises:
            WorkloadError: What was given for the forward pass does not do for the adjoint.
        """
        tolerances = {}
        for name, own, other in (("rtol", self.rtol, rtol), ("atol", self.atol, atol)):
            scalar = not isinstance(other, (tuple, list, Tensor)) or (
                isinstance(other, Tensor) and not other.dim()
            )
            if own is None and not scalar:
                raise WorkloadError(
                    f"{name} is given by parts of the state, and the adjoint equation has other "
                    f"parts; give adjoint_{name} as a number"
                )
            tolerances[name] = other if own is None else own
        if self.options is None and options and self.method not in (None, method):
            raise WorkloadError(
                f"options {sorted(options)} are those of the forward pass, and adjoint_method "
                f"{self.method!r} is another method than {method!r}; give adjoint_options, if only "
                "{}"
            )
        given = dict(options if self.options is None else self.options)
        own_norm = None if self.options is None else given.get("norm")
        given.pop("norm", None)
        return {
            **tolerances,
            "method": method if self.method is None else self.method,
            "options": {**given, "norm": _norm(own_norm, norm, shapes)},
        }


def _norm(given: Any, norm: Norm, shapes: tuple[torch.Size, ...] | None) -> Callable[[Any], Tensor]:
    """The norm of state, adjoint and integrals, as torchdiffeq has it.

    Args:
        given: Of (time, states, adjoints, integrals); "seminorm", which leaves out the integrals;
            or None.
        norm: Of flat states.
        shapes: Of their parts where they are tuples.
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
    """Let the solve of the adjoint equation call what is meant for it.

    Args:
        func: The right-hand side.
        rates: That of the adjoint equation; it gets attributes.
    """
    for name, of_adjoint in zip(NAMES, OF_ADJOINT, strict=True):
        function = getattr(func, of_adjoint, None)
        if callable(function):
            setattr(rates, name, function)
