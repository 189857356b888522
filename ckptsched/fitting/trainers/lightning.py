"""The callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any, Unpack, final

from torch import nn

from ...base.budget import Budget
from ...base.errors import PlanMismatchError
from ...planner.plan import Plan
from .followed import FitOptions, Followed

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "ckptsched.LightningCallback is for the Trainer of lightning.pytorch, which cannot be "
        f"imported here ({error}): pip install lightning"
    ) from error


@final
class LightningCallback(Callback):
    """Fits a module of a LightningModule into a budget while a `lightning.Trainer` trains it.

    The module is planned on its first call with gradients, among the precision and strategy that
    the Trainer brings, and is as it was when training ends. Other batches are planned when they are
    first seen; those that are nowhere larger follow the same schedule. Validation runs without
    gradients and is left alone.

    Args:
        budget: Bytes, text such as "8GiB", or a share such as "40%" of what storing everything
            takes on the first batch. It covers a forward and its backward: parameters, the state
            of the optimizer and gradients of earlier batches that are summed up come besides.
        module: The name of the module that `training_step` calls, as in `named_modules`, such as
            "model" or "model.encoder"; "" is the LightningModule itself, for a `training_step`
            that calls `self(x)` where the layers are its own. None for the one child that has
            trained parameters; where there are several, one is to be named.
        options: Further arguments of `ckptsched.fit`. Give `loss`, from the module's output to a
            number, to have the bytes of the loss counted exactly; they are else provided for as
            those of a cross-entropy, or are those of the loss that the output has as `.loss`.

    Raises:
        BudgetSyntaxError: The budget cannot be read.

    Example:
        >>> callback = ckptsched.LightningCallback(budget="40%")
        >>> lightning.Trainer(callbacks=[callback]).fit(module, batches)
        >>> print(callback.plan)
    """

    def __init__(
        self,
        budget: int | float | str | Budget,
        *,
        module: str | None = None,
        **options: Unpack[FitOptions],
    ) -> None:
        self._name = module
        self._followed = Followed(budget, options)

    @property
    def plan(self) -> Plan | None:
        """The plan for the first batch of the last training; None before there is one."""
        return self._followed.plan

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Fit the module, which the Trainer has prepared by now.

        Raises:
            PlanMismatchError: There is no such module, or none was named and there are several.
        """
        name = _only_child(pl_module) if self._name is None else self._name
        try:
            module = pl_module.get_submodule(name)
        except AttributeError as error:
            raise PlanMismatchError(
                f"the {type(pl_module).__name__} has no module {name!r} ({error}); name one of "
                f"{', '.join(repr(n) for n, _ in pl_module.named_children())}, or a part of one"
            ) from error
        self._followed.begin(module, repr(name) if name else "the LightningModule itself")

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Any) -> None:
        """See that the forward has followed a plan."""
        self._followed.check()

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Leave the module as it was."""
        self._followed.end()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """The same where training ends by an error."""
        self._followed.end()


def _only_child(pl_module: nn.Module) -> str:
    """The name of the one child that has something to train."""
    found = [
        name
        for name, child in pl_module.named_children()
        if any(p.requires_grad for p in child.parameters())
    ]
    if len(found) != 1:
        raise PlanMismatchError(
            f"the {type(pl_module).__name__} has {len(found)} children with trained parameters"
            f"{': ' if found else ''}{', '.join(map(repr, found))}; name the module that its "
            'training_step calls: LightningCallback(budget, module=...), "" for itself'
        )
    return found[0]
