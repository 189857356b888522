"""What users say of calls: which are never made again in a step, and which always may be.

A policy names classes of modules, paths of modules, and functions or operators. Brought together
with a recording it becomes two sets of calls, by index (`Ruled`), which a plan keeps: whoever runs
the plan later records the model again and needs no classes or functions for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, final

import torch
from torch import nn

from ...base.errors import ProfileError
from ...workload.stage import Signature
from ..recording.calls import RecordedCall, StagePath, name_of
from ..recording.cuts import CallCosts, is_of_torch

NEVER, ALWAYS = "never_recompute", "always_recompute"

Named: TypeAlias = str | type | Callable[..., Any]
"""What a policy may name: the path of a module or a pattern of paths, a class of modules or of
custom autograd Functions, a function of torch, or an operator of it."""

_WHAT = (
    "a class of modules, the path of a module as in named_modules (a * stands for any part of it), "
    "a function of torch, a custom autograd Function, or an operator such as torch.ops.aten.mm"
)
# What Python writes as an operator, and torch's name of the same.
_ARITHMETIC = {x: x for x in ("add", "sub", "mul", "matmul", "pow")} | {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
}
_MOST_NAMED = 4  # calls, in a message


@final
@dataclass(frozen=True, slots=True)
class Ruled:
    """The calls of a recording that a policy names, by index."""

    never: frozenset[int] = frozenset()
    """Those that run once a step, those that make what the model keeps among them."""
    always: frozenset[int] = frozenset()
    """Those that a lean tape may make again whatever they cost."""
    words: str = ""
    """The policy as it was asked for; empty where nothing was."""

    def may_be_made_again(self, k: int, is_cheap: bool) -> bool:
        """Whether a lean tape may leave out what a call makes.

        Args:
            k: The call, by index.
            is_cheap: Whether it may where nothing is said of it.
        """
        return (is_cheap or k in self.always) and k not in self.never

    def checked(self, calls: Sequence[RecordedCall], costs: CallCosts) -> Ruled:
        """The same for the calls of another recording of the model, which are to be as many.

        Args:
            calls: Those of the recording.
            costs: What they take, looked at closely.

        Raises:
            ProfileError: They are others: what the plan keeps is not kept in the model, or cannot
                be made again.
        """
        if any(k >= len(calls) for k in self.never | self.always):
            return self  # whoever compares the number of calls says so
        _refuse_unsound("the plan", [(calls[k], costs.why_not[k]) for k in sorted(self.always)])
        if not costs.kept <= self.never:
            raise ProfileError("the model keeps other values than when it was planned")
        return self


NOTHING_RULED = Ruled()


def ruled_by(signature: Signature) -> Ruled:
    """The calls that the policy of a plan names.

    Args:
        signature: Of the plan's chain.
    """
    return Ruled(frozenset(signature.never), frozenset(signature.always), signature.policy)


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """What never and what always is made again, as the user names it."""

    never: tuple[Named, ...] = ()
    always: tuple[Named, ...] = ()
    strict: bool = True
    """Whether each name must be that of some call. Of a model that is planned for a second kind of
    batch some may be called for the first alone."""

    @classmethod
    def of(cls, never: Any = (), always: Any = ()) -> Policy:
        """Read what `never_recompute` and `always_recompute` are given.

        Args:
            never: One name, or several.
            always: The same.

        Raises:
            ProfileError: Something that names no calls, or one thing in both.
        """
        made = cls(_listed(NEVER, never), _listed(ALWAYS, always))
        both = [_words(name) for name in made.never if name in made.always]
        if both:
            raise ProfileError(
                f"{', '.join(both)} is in {NEVER} and in {ALWAYS}; a call can be made again or "
                "not: leave it in one of them"
            )
        return made

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self.never or self.always)

    def __str__(self) -> str:
        """As it was asked for: "never_recompute=[Attention], always_recompute=[gelu]"."""
        pairs = ((NEVER, self.never), (ALWAYS, self.always))
        return ", ".join(f"{n}=[{', '.join(map(_words, found))}]" for n, found in pairs if found)

    def ruled(self, model: nn.Module, calls: Sequence[RecordedCall], costs: CallCosts) -> Ruled:
        """The calls of a recording that it names.

        Args:
            model: The model.
            calls: Those of the recording.
            costs: What they take, looked at closely.

        Raises:
            ProfileError: A name is that of no call, calls are to be made again that cannot be, or
                one is named by both.
        """
        paths = _Paths(model)
        makes = [
            made or bool(call.writes) or isinstance(call.target, str)
            for call, made in zip(calls, costs.makes_bytes, strict=True)
        ]
        never = dict.fromkeys(costs.kept, "keep in the model")
        always: dict[int, str] = {}
        for option, names, found in ((NEVER, self.never, never), (ALWAYS, self.always, always)):
            for name in names:
                named = paths.called_by(name, calls, costs)
                of_use = [k for k in named if makes[k]]
                if option is ALWAYS:
                    _refuse_unsound(
                        f"{ALWAYS}, by {_words(name)},",
                        [(calls[k], costs.why_not[k]) for k in of_use],
                    )
                    of_use = [k for k in of_use if costs.floats[k]]  # others decide something
                if not of_use and self.strict:
                    raise ProfileError(_matches_nothing(option, name, bool(named), calls))
                found.update(dict.fromkeys(of_use, f"{_words(name)} in {option}"))
        for k in sorted(never.keys() & always.keys()):
            raise ProfileError(
                f"{said(calls[k])} is never to be made again by {never[k]}, and always by "
                f"{always[k]}; name the one or the other so that it has no such call, by paths "
                "of modules for one"
            )
        words = [str(self)] if self else []
        words += ["keep() in the forward"] if costs.kept else []
        return Ruled(frozenset(never), frozenset(always), " and ".join(words))


NO_POLICY = Policy()


def said(call: RecordedCall) -> str:
    """A call as the user knows it: "blocks.0.act", or "gelu in blocks.0.mlp".

    Args:
        call: The call.
    """
    inside = f" in {call.scope}" if call.scope and not isinstance(call.target, str) else ""
    return f"{call.name}{inside}"


def _listed(option: str, given: Any) -> tuple[Named, ...]:
    several = isinstance(given, Iterable) and not (
        isinstance(given, str | type) or _is_operator(given)
    )
    names = tuple(given) if several else (given,)
    for name in names:
        is_name = callable(name) and not isinstance(name, nn.Module)
        if isinstance(name, type):
            is_name = issubclass(name, nn.Module | torch.autograd.Function)
        if not (is_name or (isinstance(name, str) and name)):
            found = f"a {type(name).__name__} module" if isinstance(name, nn.Module) else repr(name)
            raise ProfileError(f"{option} was given {found}; give {_WHAT}")
    return tuple(dict.fromkeys(map(_without_apply, names)))


def _without_apply(name: Named) -> Named:
    """The class of a custom Function of which the method was given that applies it."""
    owner = getattr(name, "__self__", None)
    is_function = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
    return owner if is_function and owner is not None else name


def _words(name: Named) -> str:
    if isinstance(name, str):
        return repr(name)
    if _is_operator(name):
        return f"torch.ops.{str(name).replace('::', '.')}"
    return name.__qualname__ if isinstance(name, type) else name_of(name)


def _is_operator(name: object) -> bool:
    return isinstance(name, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


@final
class _Paths:
    """Where in a model calls are written."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules(remove_duplicate=False))
        # A recording knows a module that has several paths by the first.
        self._first: Mapping[int, str] = {
            id(module): path for path, module in reversed(self._modules)
        }

    def called_by(self, name: Named, calls: Sequence[RecordedCall], costs: CallCosts) -> list[int]:
        """The calls that a name is for, by index."""
        if isinstance(name, str) or (isinstance(name, type) and issubclass(name, nn.Module)):
            inside = self._named(name)
            return [k for k, call in enumerate(calls) if inside & set(_around(call))]
        return [
            k for k, found in enumerate(costs.called) if any(_is_same(name, one) for one in found)
        ]

    def _named(self, name: str | type) -> set[str]:
        """The paths of the modules that a path, a pattern or a class names."""
        return {
            self._first[id(module)]
            for path, module in self._modules
            if (fnmatchcase(path, name) if isinstance(name, str) else isinstance(module, name))
        }


def _around(call: RecordedCall) -> list[str]:
    """The paths of all modules that a call is in, its own module's first."""
    target = call.target
    path = target.path if isinstance(target, StagePath) else target
    path = path if isinstance(path, str) else call.scope
    parts = path.split(".") if path else []
    return [".".join(parts[:k]) for k in range(len(parts), -1, -1)]


def _is_same(name: object, found: object) -> bool:
    """Whether what was called is what was named, or torch's same function by another name."""
    if found is name:
        return True
    if _is_operator(name) or _is_operator(found) or isinstance(name, type):
        return False
    if isinstance(found, str | type) or not (is_of_torch(name) and is_of_torch(found)):
        return False
    return _plain_name(name) == _plain_name(found) != ""


def _plain_name(function: object) -> str:
    """Such as "matmul" of `torch.matmul`, `Tensor.matmul` and `Tensor.__rmatmul__`."""
    name: str = getattr(function, "__name__", "")
    if not name.startswith("__"):
        return name.rstrip("_")  # in place
    bare = name.strip("_")
    return _ARITHMETIC.get(bare) or (_ARITHMETIC.get(bare[1:], "") if bare[:1] in "ri" else "")


def _refuse_unsound(who: str, called: Iterable[tuple[RecordedCall, str]]) -> None:
    found = [f"{said(call)} {why}" for call, why in called if why]
    if found:
        more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise ProfileError(
            f"{who} names calls that a backward cannot make again: "
            f"{'; '.join(found[:_MOST_NAMED])}{more}. Name the other calls, by functions or by "
            "paths of modules that have none of these"
        )


def _matches_nothing(
    option: str, name: Named, is_called: bool, calls: Sequence[RecordedCall]
) -> str:
    if is_called:
        return (
            f"{option} names {_words(name)}, whose calls make nothing that could be kept or made "
            "again: views, or whole numbers; leave it out"
        )
    if isinstance(name, str) or (isinstance(name, type) and issubclass(name, nn.Module)):
        paths = dict.fromkeys(path for call in calls for path in _around(call) if path)
        advice = f"the recording has calls of, among others, {', '.join([*paths][:_MOST_NAMED])}"
    else:
        names = dict.fromkeys(call.name for call in calls if not isinstance(call.target, str))
        advice = (
            "a recording sees functions and operators of torch and custom autograd Functions, such "
            f"as {', '.join([*names][:_MOST_NAMED]) or 'none in this model'}"
        )
    return f"{option} names {_words(name)}, and the model makes no call of it; {advice}"
